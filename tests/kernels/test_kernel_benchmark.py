"""The benchmark checks before it times, and prints the agreed keys."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moe_kernels

FILE = Path(moe_kernels.__file__).parents[1] / "benchmarks" / "bench_expert_mlp.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with one tiny case."""
    spec = importlib.util.spec_from_file_location("bench_expert_mlp", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CASES", {"cpu": {"tiny": module.Case(16, 16, 8, 4, 2, torch.float32)}, "cuda": {}})
    return module


def test_prints_one_json_object_a_line(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Both phases against both peers; a ratio is peer over ours."""
    bench.main(["--device", "cpu", "--repeats", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["case"], line["peer_name"]) for line in lines] == [
        (f"tiny/{phase}", peer)
        for phase in ("forward", "forward+backward")
        for peer in ("torch-grouped_mm", "dense-swiglu")
    ]
    keys = {"bench", "case", "ours", "peer", "peer_name", "unit", "ratio", "floor_fraction", "hardware", "config"}
    for line in lines:
        assert set(line) == keys
        assert line["ratio"] == pytest.approx(line["peer"] / line["ours"], abs=0.1)


def test_times_nothing_when_values_are_wrong(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong contender stops the run."""
    right = bench.grouped_mm_composition
    monkeypatch.setattr(bench, "grouped_mm_composition", lambda *inputs: right(*inputs) * 1.01)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.main(["--device", "cpu", "--repeats", "1"])
