"""Budgets that were spent before a process starts."""

import json

import pytest

from moe.config import parse_overrides
from moe.energy import fold_ledgers
from moe.rundir import RunDir
from moe.trainer import train

from .conftest import Place
from .tiny_recipe import RECIPE

STEPS = 4


@pytest.mark.parametrize(
    "budget",
    [
        ("train.max_kwh=1e-12",),
        ("train.max_device_hours=1e-9",),
        ("train.max_cost=1e-9", "energy.price_per_device_hour=2"),
    ],
    ids=lambda words: words[0].partition("=")[0],
)
def test_a_spent_budget_trains_no_further_step(
    place: Place, budget: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every start says so and leaves the run as it was; what the start itself cost is in the ledger; more mends it."""
    monkeypatch.chdir(place.folder)
    name = budget[0].partition("=")[0]
    words = [f"run.name={name}", f"train.checkpoint_every_steps={STEPS}"]
    assert train(parse_overrides(RECIPE, [*words, f"train.max_steps={STEPS}"])).reason == "complete"
    checkpoint = place.run(name) / f"checkpoints/step_{STEPS:08d}"
    before, losses = checkpoint.stat().st_mtime_ns, place.losses(name)
    for start in (1, 2):
        capsys.readouterr()
        outcome = train(parse_overrides(RECIPE, [*words, *budget, "train.max_steps=8"]))
        assert (outcome.step, outcome.reason) == (STEPS, "budget")
        said = f"runs/{name} stopped at step {STEPS} because its budget is spent; the same command goes on from there"
        assert said in capsys.readouterr().err
        fold = fold_ledgers(RunDir(place.run(name)).ledgers()).to_json()
        assert [segment["ended"] for segment in fold["segments"]] == ["end"] * (1 + start)
    assert place.losses(name) == losses
    assert checkpoint.stat().st_mtime_ns == before
    assert json.loads((checkpoint / "state.json").read_text())["step"] == STEPS
    more = train(parse_overrides(RECIPE, [*words, "train.max_steps=8"]))
    assert (more.step, more.reason) == (8, "complete")
