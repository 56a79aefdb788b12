"""The layer benchmark at tiny size: both peers, checked before they are timed."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; it sets the number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("bench_cpu_layer")
    torch.set_num_threads(threads)


def test_prints_both_peers(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The dense MLP and the fastest of transformers' ways, for each case; the configuration has every time."""
    cases = {name: bench.Case(name, 64, 32, 16, 4, 2) for name in ("fp32", "bf16")}
    bench.main(["--rounds", "2"], cases)
    lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(lines) == ["fp32/dense", "fp32/transformers", "bf16/dense", "bf16/transformers"]
    keys = {"bench", "case", "ours", "peer", "peer_name", "unit", "ratio", "floor_fraction", "hardware", "config"}
    for line in lines.values():
        assert set(line) == keys
        assert line["config"]["flops"] == 18 * 64 * 2 * 32 * 16
        assert line["peer"] == pytest.approx(line["config"]["all_ms"][line["peer_name"]], rel=1e-3)
    times = lines["bf16/transformers"]["config"]["all_ms"]
    fastest = lines["bf16/transformers"]["peer_name"]
    assert times[fastest] == min(ms for name, ms in times.items() if name.startswith("transformers"))
    assert "transformers grouped_mm in bf16" in times


def test_times_nothing_when_outputs_differ(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that computes something else is no peer."""
    right = bench.Block.forward
    monkeypatch.setattr(bench.Block, "forward", lambda block, x: right(block, x) * 1.001)
    with pytest.raises(SystemExit, match="no timing"):
        bench.main(["--rounds", "1"], {"fp32": bench.Case("fp32", 64, 32, 16, 4, 2)})
