"""A loss that is not finite, or spikes: the run stops, leaves the update out, or goes back and takes other batches."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data import Sampling, load_data, open_encoder, open_sources
from moe.energy import fold_ledgers
from moe.rundir import RunDir, read_metrics
from moe.trainer.spikes import SpikeGuard

Place = Any  # the fixture's class; conftest is not importable by name
SHORT = ("train.max_steps=24", "train.checkpoint_every_steps=5", "train.eval_every_tokens=1000000")


@pytest.fixture(scope="module")
def calm(place: Place) -> dict[int, float]:
    """Losses of the run in which nothing happened."""
    done = place.python("run.name=calm", *SHORT, recipe="hooked_recipe.py")
    assert done.returncode == 0, done.stderr
    return place.losses("calm")


def test_a_guard_knows_a_spike_from_noise() -> None:
    """Six standard deviations refuse a spike in loss or norm, not the noise; refused steps are not remembered."""
    guard = SpikeGuard(6.0)
    noise = [(2 + 0.1 * math.sin(step), 1 + 0.1 * math.cos(step)) for step in range(40)]
    assert [guard.complaint(*step) for step in noise] == [None] * 40
    for _ in range(50):  # were spikes remembered, they would come to look usual
        complaint = guard.complaint(4.0, 1.0)
        assert complaint is not None
        assert complaint.startswith("train/loss is 4, ")
        assert complaint.endswith(" standard deviations above the 40 steps before")
    assert "train/grad_norm is 9" in (guard.complaint(2.0, 9.0) or "")
    assert "train/loss is nan" in (guard.complaint(math.nan, 1.0) or "")
    again = SpikeGuard(6.0, guard.recent)
    assert again.complaint(2.2, 1.0) == guard.complaint(2.2, 1.0) is None
    assert again.recent == guard.recent


def test_a_young_run_has_no_spikes_but_nan() -> None:
    """Before there is a standard deviation to speak of, only what is not finite is refused."""
    guard = SpikeGuard(2.0)
    assert all(guard.complaint(10.0**step, 1.0) is None for step in range(15))
    assert guard.complaint(1.0, math.inf) is not None
    assert SpikeGuard(None).complaint(1e9, 1e9) is None


def test_stop_names_step_and_batch_and_saves_what_was_before(place: Place, calm: dict[int, float]) -> None:
    """With a watched spike the update is not made; going on with another policy loses nothing."""
    words = ("run.name=stopping", *SHORT)
    done = place.python(*words, "train.spike_sigmas=100", recipe="hooked_recipe.py", environment={"SPIKE": "20"})
    assert done.returncode == 2, done.stderr
    assert "error: train/loss is " in done.stderr
    assert "at step 20 (sequences 76 to 79); the update was not made and step 19 is saved" in done.stderr
    assert (place.run("stopping") / "checkpoints" / "step_00000019").is_dir()
    again = place.python(*words, "train.spike_sigmas=100", recipe="hooked_recipe.py")
    assert again.returncode == 0, again.stderr
    assert place.losses("stopping") == calm


def test_stop_at_the_first_step_has_nothing_to_save(place: Place) -> None:
    """And does not say it has."""
    words = ("run.name=stillborn", *SHORT, "train.spike_sigmas=100")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"POISON": "1"})
    assert done.returncode == 2, done.stderr
    assert "at step 1 (sequences 0 to 3); the update was not made: go on with" in done.stderr
    assert not list((place.run("stillborn") / "checkpoints").iterdir())


def test_unwatched_nan_is_named_with_its_batch(place: Place) -> None:
    """By default nothing waits for the device before the update; the row of that step is refused instead."""
    done = place.python("run.name=nan", *SHORT, recipe="hooked_recipe.py", environment={"POISON": "7"})
    assert done.returncode == 2, done.stderr
    assert "error: train/loss is nan and train/grad_norm is nan at step 7 (sequences 24 to 27)" in done.stderr
    assert max(place.losses("nan")) == 6
    assert [path.name for path in (place.run("nan") / "checkpoints").iterdir()] == ["step_00000005"]


def test_skip_leaves_one_update_out(place: Place, calm: dict[int, float]) -> None:
    """The poisoned step leaves weights, moments and biases alone; the steps before are untouched, those after go on."""
    words = ("run.name=skipping", *SHORT, "train.on_spike=skip")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"POISON": "7"})
    assert done.returncode == 0, done.stderr
    assert "skipped: train/loss is nan and train/grad_norm is nan at step 7 (sequences 24 to 27)" in done.stderr
    losses = place.losses("skipping")
    assert sorted(losses) == [step for step in range(1, 25) if step != 7]
    assert all(losses[step] == calm[step] for step in range(1, 7))
    assert losses[8] != calm[8]
    assert all(math.isfinite(loss) for loss in losses.values())
    (row,) = [row for row in place.rows("skipping") if row.get("train/skipped_in_a_row")]
    assert row["train/step"] == 7


def test_skips_with_good_steps_between_never_end_a_run(place: Place) -> None:
    """Twelve refused steps, none after another, in a run that hardly logs."""
    poison = ",".join(map(str, range(1, 24, 2)))
    words = ("run.name=hiccups", *SHORT, "train.on_spike=skip", "train.log_every_steps=100")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"POISON": poison})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped: ") == 12


def test_the_guard_watches_the_loss_by_its_name(place: Place) -> None:
    """A hook may log other numbers before it; one that logs no loss at all is told."""
    words = ("run.name=ordered", *SHORT, "train.spike_sigmas=100")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"SPIKE": "20", "FIRST": "train/other"})
    assert "error: train/loss is " in done.stderr
    done = place.python("run.name=lossless", *SHORT, recipe="hooked_recipe.py", environment={"LOSSLESS": "1"})
    assert done.returncode == 2
    assert "error: Misbehaving.objective logs train/penalty but no train/loss" in done.stderr


def test_skipping_for_ever_ends(place: Place) -> None:
    """Eleven refused steps in a row are not the batches' fault."""
    poison = ",".join(map(str, range(3, 40)))
    words = ("run.name=hopeless", *SHORT, "train.on_spike=skip")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"POISON": poison})
    assert done.returncode == 2, done.stderr
    assert "at step 13 (sequences 48 to 51), the 11th in a row: the weights must be at fault" in done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_rollback_passes_over_the_batches(place: Place, calm: dict[int, float], tmp_path: Path, ranks: int) -> None:
    """Back to step 5, on with the batch after the poisoned one, in one command; another start sees the same batches."""
    name, seen = f"rolling{ranks}", tmp_path / "seen"
    words = (f"run.name={name}", *SHORT, "train.on_spike=rollback", f"train.micro_batch_size={4 // ranks}")
    environment = {"POISON": "8", **({"SEEN": str(seen)} if ranks == 1 else {})}
    done = place.launch(*words, recipe="hooked_recipe.py", environment=environment, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rolled back to step 5: ") == 1
    assert "at step 8 (sequences 28 to 31)" in done.stderr
    run = RunDir(place.run(name))
    assert json.loads(run.skipped.read_text())["skipped"][0]["batches"] == 3
    rows = [row for row in read_metrics(run.metrics) if "train/loss" in row]
    assert [row["train/step"] for row in rows] == list(range(1, 25))
    if ranks == 1:
        assert [row["train/loss"] for row in rows[:5]] == [calm[step] for step in range(1, 6)]
        config = DataConfig(source=str(place.folder / "text"), validation_fraction=0.1)
        encoder = open_encoder(run.tokenizer, 300)
        data = load_data(open_sources(config), config, encoder, run.tokens, Sampling(seq_len=32, seed=0))
        batches = [*range(8), *range(8, 8 + 19)]  # steps 1-8, then 6-24 with what follows the poisoned batch
        expected = [int(data.train.batch(4 * batch, 4).sum()) for batch in batches]
        assert np.loadtxt(seen, dtype=int).tolist() == expected
    fold = fold_ledgers(run.ledgers()).to_json()
    assert [segment["ended"] for segment in fold["segments"]] == ["end", "end"]
    assert fold["total"]["useful_device_hours"] < fold["total"]["device_hours"]
    assert fold["segments"][1]["first_step"] == 5


def test_rolling_back_for_ever_ends(place: Place) -> None:
    """The fourth rollback to one checkpoint is refused."""
    words = ("run.name=sisyphus", *SHORT, "train.on_spike=rollback")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"POISON": "7,9,11,13"})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("rolled back to step 5: ") == 3
    assert "after 3 rollbacks to step 5: other batches do not help" in done.stderr
