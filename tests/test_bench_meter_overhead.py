"""The overhead benchmark at tiny size: its processes run to the end, and its lines hold what they promise."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "model.vocab_size=512", "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=96",
    "model.n_routed_experts=4", f"data.source={ROOT / 'LICENSE'}", "train.seq_len=32", "train.global_batch_size=2",
    "train.eval_every_tokens=128", "train.eval_sequences=2",
)  # fmt: skip


def test_prints_one_line_a_case(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Shares add up, steps with and without the meter are compared; only start and stop meet a slow driver."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    bench = importlib.import_module("bench_meter_overhead")
    cases = ("8 GPUs, 20 ms", "trainer")
    bench.main(["--case", *cases, "--pairs", "2", "--block", "0.3", "--steps", "4", "--recipe", *TINY])
    lines = {line["case"]: line for line in map(json.loads, capfd.readouterr().out.splitlines())}
    assert tuple(lines) == cases
    for line in lines.values():
        found = line["config"]
        assert line["ours"] == pytest.approx(found["share"], rel=1e-4)
        assert found["share"] == pytest.approx(found["reader_share"] + found["calls_share"])
        assert line["ratio"] == pytest.approx(0.001 / found["share"], rel=1e-4)
        assert {"EnergyMeter.phase", "EnergyMeter.snapshot", "EnergyMeter.flush"} <= set(found["longest_call_ms"])
    slow = lines[cases[0]]["config"]
    assert slow["source"] == "counter"
    low, high = slow["on_over_off_95"]
    assert low <= slow["on_over_off"] <= high
    assert slow["start_and_stop_ms"]["start"] >= 8 * 20
    assert "Window.__exit__" in slow["longest_call_ms"]
