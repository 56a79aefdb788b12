"""The meter benchmark at tiny size, and its picture; tests/energy/test_accuracy.py checks the numbers."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with two short windows on a few GPUs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("bench_meter_accuracy")
    monkeypatch.setattr(module, "LENGTHS_S", {0.5: 2})
    monkeypatch.setattr(module, "WITHIN_S", 1.5)
    monkeypatch.setattr(module, "GROUPS", dict.fromkeys(module.GROUPS, 3))
    return module


def test_a_line_for_each_group_and_length(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Shares covered against their goal, errors without one below ten seconds; a missing peer is a sentence."""
    bench.main(["--peers", sys.executable])
    out, err = capsys.readouterr()
    lines = {line["case"]: line for line in map(json.loads, out.splitlines())}
    assert list(lines) == [f"{group}/{case}" for group in bench.GROUPS for case in ("0.5 s", "all")]
    keys = {"bench", "case", "ours", "peer", "peer_name", "unit", "ratio", "floor_fraction", "hardware", "config"}
    for line in lines.values():
        assert set(line) == keys
        assert line["config"]["windows"] == 6
    assert lines["average, gain/0.5 s"]["ours"] == lines["average, gain/0.5 s"]["config"]["covered"]
    assert lines["counter, gain 1/0.5 s"]["ours"] == pytest.approx(
        lines["counter, gain 1/0.5 s"]["config"]["error_max"], rel=1e-4
    )
    assert f"zeus is not installed in {sys.executable}" in err


@pytest.mark.parametrize(("length_s", "goal"), [(0.5, None), (5, None), (10, 0.005), (30, 0.005), (60, 0.001)])
def test_goals_begin_at_ten_seconds(bench: ModuleType, length_s: float, goal: float | None) -> None:
    assert bench.goal_of(length_s) == goal


def test_the_scripts_follow_from_the_seed_and_stay_within_the_limit(bench: ModuleType) -> None:
    """Steps, ramps and bursts between 80 and 700 W, times that never fall, gains within 5 %."""
    made = bench.make("counter, gain", 12, 3, 10**12)
    assert made == bench.make("counter, gain", 12, 3, 10**12)
    assert made != bench.make("counter, gain", 12, 4, 10**12)
    for gpu in made:
        times, watts = zip(*gpu.script.knots, strict=True)
        assert list(times) == sorted(times)
        assert (times[0], times[-1]) == (0, 30 * 10**9)
        assert min(watts) >= 80_000
        assert max(watts) <= 700_000
        assert 950 <= gpu.script.counter_gain <= 1050


def test_the_picture_has_both_panels(bench: ModuleType) -> None:
    """Median, largest error and the goal; and each tool, named with its version, ours once."""
    plot = importlib.import_module("plot_meter_accuracy")
    lines = []
    for length_s in (1.0, 10.0):
        errors = {"error_median": 0.001, "error_max": 0.005}
        lines.append({"case": f"counter, gain 1/{length_s:g} s", "config": {"length_s": length_s, **errors}})
        for peer in ("zeus 1.2", "codecarbon 3.4"):
            case = f"counter, gain 1/{length_s:g} s/{peer.split()[0]}"
            config = {"length_s": length_s}
            lines.append({"case": case, "ours": 0.001, "peer": 0.03, "peer_name": peer, "config": config})
    drawn = plot.picture(lines)
    assert drawn.count("<polyline") == 3 + 3
    assert all(
        f">{name}</text>" in drawn for name in ("median", "largest", "goal", "our meter", "zeus 1.2", "codecarbon 3.4")
    )
