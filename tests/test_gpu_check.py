"""scripts/gpu_check: that it runs end to end without a GPU and on a bare machine, and outlives parts that do not."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("environment", "nvml_probe", "kernels", "bench_kernels", "metered_runs", "kernel_energy", "attribution")

# Absent on a bare GPU image; hidden as if they were not installed. An installation of this project is hidden too.
BARE = """
import sys

HIDDEN = {"wandb", "typer", "rich", "plotly", "deepspeed", "datasets"}


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Hiding(f) for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The script's own modules can be imported; nothing is written beside them."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu"))
    yield
    for name in [name for name in sys.modules if name.startswith("gpu_check_")]:
        del sys.modules[name]


def gpu_check(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, on a machine whose GPUs are hidden."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [str(ROOT / "scripts" / "gpu_check"), *words]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=200)


def test_without_a_gpu_it_says_so() -> None:
    """One sentence, exit status 2."""
    result = gpu_check()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("No CUDA GPU is visible: ")


def test_dry_run_on_a_bare_machine(tmp_path: Path) -> None:
    """Every part runs to its end with the optional packages absent, and leaves what its record promises."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "out"
    result = gpu_check("--dry-run", "--out", str(out), PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    table = result.stdout.splitlines()
    assert [line.split()[:2] for line in table[1:-1]] == [[part, "ok"] for part in PARTS]
    assert table[-1].startswith("dry run on the CPU, no measurement: 7 ok, 0 failed, 0 skipped")

    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert set(files) == {*(f"{part}.json" for part in PARTS), "summary.json", "nvml_trace.json", "logs.tar.gz"}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) and size < 4_000_000 for name, size in files.items())
    found = {part: json.loads((out / f"{part}.json").read_text())["data"] for part in PARTS}

    assert found["environment"]["versions"]["torch"]
    assert len(found["environment"]["tree_sha256"]) == 64
    probe = found["nvml_probe"]
    # the made-up GPU: 400 W on average, a counter that moves every 100 ms, no energy under field 191
    assert probe["steady"]["counter_mean_w"] == pytest.approx(400, rel=0.05)
    assert abs(probe["steady"]["power_instant"]["percent_over_counter"]) < 5
    assert probe["ticks_load"]["interval_ms"]["median"] == pytest.approx(100, rel=0.2)
    assert "value" in next(row for row in probe["fields"] if (row["field"], row["scope"]) == (186, 0))
    assert next(row for row in probe["fields"] if row["field"] == 191)["nvml_return"] == 3
    assert found["kernels"]["self_check"]["backend"] == "interpreter"
    assert found["kernels"]["tests"]["skipped"] > 100
    assert {line["case"].split("/")[2] for line in found["bench_kernels"]["lines"]} >= {"experts", "layer", "router"}
    assert all(line["unit"].startswith("J per") and line["ours"] > 0 for line in found["kernel_energy"]["lines"])
    shares = found["attribution"]["components"]
    assert set(shares) == {"attention", "router", "experts", "feed_forward", "head", "optimizer"}
    assert all(share["by_time_j"] > 0 and share["alone_j"] > 0 for share in shares.values())
    step_j = found["attribution"]["step_j"]
    by_time_j = sum(share["by_time_j"] for share in shares.values()) + step_j["other_by_time"]
    assert by_time_j == pytest.approx(step_j["whole"], rel=1e-6)
    runs = found["metered_runs"]
    for name in ("gpu_check_moe", "gpu_check_dense"):
        assert runs[name]["ledger"]["total"]["energy_j"] > 0
        assert runs[name]["counter_around_the_process_j"] > 0
    assert runs["comparison"]["ratios"]["device_hours"]["value"] > 0
    with tarfile.open(out / "logs.tar.gz") as archive:
        names = archive.getnames()
    assert {"logs/gpu_check_moe/ledger.jsonl", "logs/gpu_check_dense/metrics.jsonl", "logs/kernels.log"} <= set(names)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_part_that_dies_costs_only_itself(modules: None, tmp_path: Path) -> None:
    """A hang ends at its limit with all it started, a crash is named, and what follows runs."""
    from gpu_check_run import Check, PartPlan

    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.05)"
    plans = [
        PartPlan("hang", 2, 1, python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")),
        PartPlan("crash", 20, 1, python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")),
        PartPlan("error", 20, 1, python("print('some work'); raise SystemExit('no such device')")),
        PartPlan("fine", 20, 1, python("pass")),
        PartPlan("long", 1000, 500),
    ]
    out = tmp_path / "out"
    out.mkdir()
    check = Check(out, tmp_path / "work", 60, {**os.environ, "PYTHONUNBUFFERED": "1"}, False)  # as parts have it
    check.run(plans)
    assert [(r.status, r.reason) for r in check.results] == [
        ("failed", "killed at its limit of 2 s"),
        ("failed", "ended by SIGSEGV"),
        ("failed", "no such device"),
        ("ok", ""),
        ("skipped", check.results[-1].reason),
    ]
    assert "it needs 500" in check.results[-1].reason
    size = beat.stat().st_size
    time.sleep(0.3)
    assert beat.stat().st_size == size, "the hanging part's child lives on"
    summary = json.loads((out / "summary.json").read_text())
    assert [part["status"] for part in summary["parts"]] == ["failed", "failed", "failed", "ok", "skipped"]
    assert json.loads((out / "long.json").read_text())["status"] == "skipped"
    assert "1 ok, 3 failed, 1 skipped" in check.table()


def test_a_killed_part_leaves_what_it_found(modules: None, tmp_path: Path) -> None:
    """Findings are written as they are made, and a failed section does not end the part."""
    from gpu_check_part import Part

    part = Part(tmp_path / "record.json", tmp_path / "work", 10, False)
    with part.section("first"):
        part.put("number", 1)
        raise ValueError("sensor gone")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["data"]["number"] == 1
    assert record["notes"] == ["first failed: ValueError: sensor gone"]
    assert part.failures == 1


def test_the_measured_models_fit(modules: None) -> None:
    """The larger models are valid and fit: under 8 GiB to train."""
    from gpu_check_metered_runs import RUNS, SIZE, WORDS, models

    from moe.accounting import num_parameters
    from moe.config import parse_overrides

    words = models(dry=False)
    assert list(words) == list(RUNS)
    base = importlib.import_module("quickstart_moe").RECIPE  # models() made the recipes importable
    recipe = parse_overrides(base, [*words["gpu_check_moe"], *WORDS])
    assert recipe.model == base.model.replace(**SIZE)
    assert 16 * num_parameters(recipe.model) < 8 * 2**30  # weight, gradient and two moments in fp32


def test_agreement_of_counter_and_power(modules: None) -> None:
    """A counter that runs 5 % below a steady power is told as power 5.26 % above the counter, whatever its ticks."""
    from gpu_check_ticks import compare_with_counter, quantile

    ms = 1_000_000
    power = [(t * ms, 500_000.0) for t in range(0, 3000, 10)]
    counter = [(t * ms, 0.95 * 500 * (t // 100 * 100)) for t in range(0, 3000, 10)]
    found = compare_with_counter(counter, {"power": power})
    assert found["counter_mean_w"] == 475
    assert found["power"]["percent_over_counter"] == pytest.approx(5.263)  # type: ignore[index]
    assert compare_with_counter(counter[:5], {})["error"] == "the counter changed 0 times"
    assert quantile([1, 2, 3, 4], 0.5) == 2.5
