"""Where a run starts: anew, from its newest whole checkpoint, or from a named one."""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint import list_checkpoints, newest_whole, read_state, step_of, verify
from moe.config import Recipe
from moe.config.fields import shortened
from moe.errors import CheckpointError, ConfigError
from moe.rundir import RunDir, read_metrics
from moe.schedule import decay_start

__all__ = ["Start", "discard_later", "find_start"]


@dataclass(frozen=True)
class Start:
    """`checkpoint` None starts anew. `complaints` are sentences about checkpoints that were passed over.

    `trained` tells whether the run directory holds any step yet: else what a failed start left there may be replaced.
    """

    trained: bool
    checkpoint: Path | None = None
    step: int = 0
    tokens: int = 0
    complaints: tuple[str, ...] = ()


def find_start(recipe: Recipe, run: RunDir) -> Start:
    """Decide by `train.resume` and what the run directory holds.

    Raises ConfigError when the run exists and `train.resume=never`, when a named checkpoint is missing or damaged, or
    when the recipe would change what the run learns.
    """
    resume = recipe.train.resume
    trained = _has_trained(run)
    if resume == "never" and trained:
        raise ConfigError(
            f"run.name={recipe.run.name!r} exists in {recipe.run.directory} and train.resume=never; "
            "choose another run.name, or train.resume=auto to go on"
        )
    if trained:
        _check_same(recipe, run)
    start = _newest(run, trained) if resume in ("auto", "never") else _named(Path(resume), run, trained)
    if start.checkpoint:
        _check_decay(recipe, run, start.step)
    return start


def discard_later(run: RunDir, start: Start) -> list[Path]:
    """Rename checkpoints beyond the start, so that neither `auto` nor pruning takes them for this lineage's."""
    discarded = []
    for path in list_checkpoints(run.checkpoints):
        if step_of(path) > start.step:
            aside = path.with_name(f"discarded_{path.name}_{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
            discarded.append(path.rename(aside))
    return discarded


def _has_trained(run: RunDir) -> bool:
    """Whether any step was logged or saved: a run that failed before its first step may be started again, mended."""
    if list_checkpoints(run.checkpoints):
        return True
    return run.metrics.is_file() and any("train/loss" in row for row in read_metrics(run.metrics))


def _newest(run: RunDir, trained: bool) -> Start:
    newest, complaints = newest_whole(run.checkpoints)
    if newest is None:
        return Start(trained=trained, complaints=tuple(complaints))
    return _from(newest, trained, tuple(complaints))


def _named(checkpoint: Path, run: RunDir, trained: bool) -> Start:
    if not os.path.isdir(checkpoint):  # unlike Path's, this has an answer for names too long to exist
        raise ConfigError(
            f"train.resume={shortened(str(checkpoint))!r} is not a folder; give auto, never, or a checkpoint such as "
            f"{run.checkpoints}/step_00000200"
        )
    try:
        verify(checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"train.resume={str(checkpoint)!r} cannot be used: {error}") from None
    if checkpoint.resolve().parent != run.checkpoints.resolve():
        raise ConfigError(
            f"train.resume={str(checkpoint)!r} is not in {run.checkpoints}: what another run spent on it would be "
            "missing from this one's ledger; copy that run's whole directory under the new name instead"
        )
    return _from(checkpoint, trained, ())


def _from(checkpoint: Path, trained: bool, complaints: tuple[str, ...]) -> Start:
    state = read_state(checkpoint)
    return Start(trained, checkpoint, int(state["step"]), int(state["tokens"]), complaints)


def _check_same(recipe: Recipe, run: RunDir) -> None:
    try:
        before = Recipe.read(run.config).to_dict()
    except ConfigError as error:
        raise ConfigError(f"run.name={recipe.run.name!r}: {error}") from None
    for name, section in recipe.sections().items():
        for field in dataclasses.fields(section):
            value = section.to_dict()[field.name]
            old = before[name][field.name]
            if not field.metadata["may_change"] and old != value:
                raise ConfigError(
                    f"{name}.{field.name}={_show(value)} differs from run {recipe.run.name!r}, which has {_show(old)}; "
                    "choose another run.name for a new run"
                )


def _check_decay(recipe: Recipe, run: RunDir, step: int) -> None:
    """Under wsd the length may change until the decay begins: later, the steps behind had other rates than it says."""
    before = Recipe.read(run.config).train.max_steps
    wanted = recipe.train.max_steps
    begins = min(decay_start(recipe.optim, before), decay_start(recipe.optim, wanted))
    if recipe.optim.schedule == "wsd" and recipe.optim.decay_steps and before != wanted and step > begins:
        recipe.train.fail(
            "max_steps",
            f"differs from run {recipe.run.name!r}, which has {before}, and would move a decay that begins at step "
            f"{begins}, before its step {step}; go back to a checkpoint before that with train.resume=PATH, or branch "
            "from one with moe branch",
        )


def _show(value: Any) -> str:
    return "none" if value is None else str(value)
