"""How benchmarks take turns."""

import importlib
import time
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("measure")


def test_everyone_in_turn(measure: ModuleType) -> None:
    """Each round has one fresh batch and then everyone once, another one first; the warm-up is not counted."""
    seen: list[str] = []
    work = {name: lambda name=name: (seen.append(name), time.sleep(0.002)) for name in ("a", "b")}
    times = measure.race(work, "cpu", 3, fresh=lambda: seen.append("fresh"))
    in_order, turned = ["fresh", "a", "b"], ["fresh", "b", "a"]
    assert seen == in_order * measure.WARM_UP + in_order + turned + in_order
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert min(times["a"]) >= 2  # milliseconds


def test_what_is_slow_runs_less_often(measure: ModuleType) -> None:
    """A peer many times slower than the fastest does not take the time of all."""
    work = {"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.05)}
    times = measure.race(work, "cpu", 8)
    assert len(times["fast"]) == 8
    assert len(times["slow"]) == measure.SLOW_ROUNDS
    assert measure.paired_ratio(times, "fast", "slow") > measure.SLOW


def test_ratio_is_the_median_of_pairs(measure: ModuleType) -> None:
    """A round in which the machine was twice as slow for both changes nothing."""
    assert measure.paired_ratio({"a": [1, 2, 10], "b": [3, 6, 30]}, "a", "b") == 3
