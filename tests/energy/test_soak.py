"""The ledger's proof: a training that is killed again and again tells what the GPU's own counter tells."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("soak")


@pytest.mark.parametrize(
    ("kills", "steps_a_kill"), [(3, 30), pytest.param(50, 80, marks=pytest.mark.soak)], ids=["three", "fifty"]
)
def test_kills_cost_a_flush_interval_each_and_change_no_bit(
    soak: ModuleType, node: Any, gpu: Any, tmp_path: Path, kills: int, steps_a_kill: int
) -> None:
    """As a checkpoint is written, by a power cut, in ten seconds of work that is lost: joules, hours, weights."""
    gpu = node.set(gpu, power1_mw=317_123, power2_mw=683_001, period_ns=1_300_000_000)
    trained = soak.Soak(tmp_path, node.env, gpu, kills=kills, seed=0, steps_a_kill=steps_a_kill)
    trained.run()
    verdicts = soak.Verdicts(trained)
    assert [sentence for sentence, holds in verdicts.holds.items() if not holds] == []
    assert verdicts.numbers["kills"] == kills
    assert verdicts.numbers["not_billed_mj"] > 0  # the machine was off for longer than a flush interval
    assert {life.kind for life in trained.lives} >= {"checkpoint", "power cut", "rare", "end"}
    assert verdicts.numbers["lost_between_rare_checkpoints_mj"] > 4 * 317_123  # ten seconds but for a flush interval
