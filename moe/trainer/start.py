"""Where a run starts: anew, from its newest whole checkpoint, or from a named one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint import newest_whole, read_state, verify
from moe.config import Recipe
from moe.errors import CheckpointError, CompareError, ConfigError
from moe.rundir import RunDir

__all__ = ["Start", "find_start"]

# what may differ between a run and its continuation: how long, how watched, how saved; never what is learnt
_MAY_CHANGE = {
    "run": {"directory"},
    "train": {
        "checkpoint_every_steps",
        "compile",
        "eval_every_tokens",
        "eval_sequences",
        "keep_checkpoints",
        "log_every_steps",
        "max_device_hours",
        "max_kwh",
        "max_steps",
        "micro_batch_size",
        "resume",
    },
    "tracking": {"trackers", "project"},
    "energy": {"declared_power_w", "interval_s"},
}


@dataclass(frozen=True)
class Start:
    """`checkpoint` None starts anew. `complaints` are sentences about checkpoints that were passed over."""

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
    exists = run.config.is_file()
    if resume == "never" and exists:
        raise ConfigError(
            f"run.name={recipe.run.name!r} exists in {recipe.run.directory} and train.resume=never; "
            "choose another run.name, or train.resume=auto to go on"
        )
    if exists:
        _check_same(recipe, run)
    if resume not in ("auto", "never"):
        return _from(Path(resume), ())
    newest, complaints = newest_whole(run.checkpoints)
    return _from(newest, tuple(complaints)) if newest else Start(complaints=tuple(complaints))


def _from(checkpoint: Path, complaints: tuple[str, ...]) -> Start:
    try:
        verify(checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"train.resume={str(checkpoint)!r} cannot be used: {error}") from None
    state = read_state(checkpoint)
    return Start(checkpoint, int(state["step"]), int(state["tokens"]), complaints)


def _check_same(recipe: Recipe, run: RunDir) -> None:
    try:
        before = run.read_json(run.config)
    except CompareError as error:
        raise ConfigError(f"run.name={recipe.run.name!r}: {error}") from None
    for section, fields in recipe.to_dict().items():
        for name, value in fields.items():
            old = before.get(section, {}).get(name)
            if name not in _MAY_CHANGE.get(section, ()) and old != value:
                raise ConfigError(
                    f"{section}.{name}={_show(value)} differs from run {recipe.run.name!r}, which has {_show(old)}; "
                    "choose another run.name for a new run"
                )


def _show(value: Any) -> str:
    return "none" if value is None else str(value)
