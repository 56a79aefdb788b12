"""A tracker that is missing or fails costs a sentence, never the training and never a row of metrics.jsonl."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe.config import ModelConfig, Recipe, RunConfig, TrackingConfig
from moe.errors import ConfigError
from moe.rundir import RunDir, write_json
from moe.tracking import Tracking, rebuild

Tracked = Any  # the fixture's class; conftest is not importable by name

RECIPE = Recipe(
    run=RunConfig(name="mine"),
    model=ModelConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, attention="gqa"
    ),
    tracking=TrackingConfig(trackers=("tensorboard",)),
)


def a_run(folder: Path) -> RunDir:
    run = RunDir.named("mine", folder)
    run.create()
    write_json(run.config, RECIPE.to_dict())
    return run


def steps_of(run: RunDir) -> list[int]:
    return [json.loads(line)["train/step"] for line in run.metrics.read_text().splitlines()[1:]]


def test_a_package_that_is_not_installed_is_named(tracked: Tracked) -> None:
    """One sentence with what to install; the run completes and the other tracker is served."""
    recipes = str(Path(__file__).parents[1] / "trainer")
    code = (
        f"import sys; sys.modules.update(wandb=None, trackio=None); sys.path.insert(0, {recipes!r})\n"
        "from tiny_recipe import RECIPE, main\nmain(RECIPE)\n"
    )
    done = tracked.python(
        "-c", code, "run.name=without", "tracking.trackers=wandb,trackio,tensorboard", "train.max_steps=3"
    )
    assert done.returncode == 0, done.stderr
    assert "runs/without is complete at step 3" in done.stderr
    for name in ("wandb", "trackio"):
        assert done.stderr.count(f"tracking.trackers={name} needs the package {name}: pip install {name}") == 1
    if "tensorboard" in tracked.installed:
        assert list(tracked.run("without").glob("tensorboard/events.out.*"))


# what happens to a tracker between two rows
FULL_DISK = """
(written,) = (run.root / "tensorboard").glob("events.out.*")
written.unlink()
written.symlink_to("/dev/full")
"""
KILLED = """
for entry in Path("/proc").iterdir():
    try:
        words = (entry / "cmdline").read_bytes().split(b"\\0")
    except OSError:
        continue
    if b"wandb-core" in words[0] and str(os.getpid()).encode() in words:
        os.kill(int(entry.name), signal.SIGKILL)
"""
PROGRAM = """
import dataclasses, os, signal, sys
from pathlib import Path
from moe.config import Recipe, TrackingConfig
from moe.rundir import RunDir
from moe.tracking import Tracking

run = RunDir.existing(sys.argv[1])
recipe = Recipe.from_dict(run.read_json(run.config))
recipe = dataclasses.replace(recipe, tracking=TrackingConfig(trackers=(sys.argv[2],)))
tracking = Tracking(recipe, run, segment=0, resumed_step=0)
tracking.log({"train/step": 1, "train/loss": 3.0})
exec(sys.argv[3])
for step in range(2, 200):
    tracking.log({"train/step": step, "train/loss": 3.0})
tracking.close()
"""


@pytest.mark.parametrize(
    ("name", "accident", "reason"), [("tensorboard", FULL_DISK, "No space left on device"), ("wandb", KILLED, "")]
)
def test_a_tracker_fails_in_mid_run(tmp_path: Path, name: str, accident: str, reason: str) -> None:
    """A full disk under TensorBoard, a killed W&B service: a sentence, all rows, and the run's own exit code."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    run = a_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run.root), name, accident], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"tracker {name} is left out from here on (") == 1
    assert reason in done.stderr
    assert steps_of(run) == list(range(1, 200))


def test_a_run_is_sent_again(tmp_path: Path) -> None:
    """`rebuild` gives TensorBoard the final lineage, whatever it had before."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = a_run(tmp_path)
    for segment, resumed, steps in ((0, 0, range(1, 6)), (1, 3, range(4, 8))):
        tracking = Tracking(RECIPE, run, segment=segment, resumed_step=resumed)
        for step in steps:
            tracking.log({"train/step": step, "train/loss": segment + step / 10})
        tracking.close()
    assert rebuild(run, "tensorboard") == 7
    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    shown = [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")]
    assert shown == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 1.4), (5, 1.5), (6, 1.6), (7, 1.7)]


def test_sending_again_what_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker that is not installed is one ConfigError."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = a_run(tmp_path)
    Tracking(dataclasses.replace(RECIPE, tracking=TrackingConfig()), run, segment=0, resumed_step=0).close()
    with pytest.raises(ConfigError, match="needs the package wandb"):
        rebuild(run, "wandb")
