"""Where metrics go: metrics.jsonl always, and the trackers the recipe asks for, opened by rank 0 alone."""

import importlib.util
import netrc
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

from moe.config import Recipe
from moe.errors import ConfigError
from moe.parallel import ranks
from moe.rundir import MetricsWriter, RunDir, write_json

__all__ = ["Tracking"]

# metric pattern -> the axis it is drawn against
_AXES = {"train/*": "train/step", "router/*": "train/step", "efficiency/*": "train/step", "energy/*": "train/step"}
_EVAL_AXIS = "train/tokens"


class Tracking:
    """Writes rows of metrics. On ranks other than the first every call does nothing.

    Args:
        segment: number of this process lifetime in the run's ledger.
        resumed_step: optimizer step this segment starts from.
    """

    def __init__(self, recipe: Recipe, run: RunDir, *, segment: int, resumed_step: int) -> None:
        self._writer: MetricsWriter | None = None
        self._trackers: list[Any] = []
        if not ranks.is_first():
            return
        self._writer = MetricsWriter(run.metrics, segment=segment, resumed_step=resumed_step)
        if "wandb" in recipe.tracking.trackers:
            self._trackers.append(_open_wandb(recipe, run))

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one row; it must hold `train/step`."""
        if self._writer is None:
            return
        self._writer.append(row)
        for tracker in self._trackers:
            tracker.log(dict(row), step=row["train/step"])

    def sync(self) -> None:
        """Put metrics.jsonl on the disk."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for tracker in self._trackers:
            tracker.finish()


def _open_wandb(recipe: Recipe, run: RunDir) -> Any:
    """accelerate's W&B tracker on this run; a resumed run continues under the same id."""
    from accelerate.tracking import WandBTracker

    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("tracking.trackers=wandb needs the package wandb: pip install wandb, or use none")
    identity = run.root / "tracking.json"
    if not identity.is_file():
        write_json(identity, {"wandb_id": f"{recipe.run.name}-{os.urandom(4).hex()}"})
    tracker = WandBTracker(
        recipe.tracking.project,
        name=recipe.run.name,
        id=run.read_json(identity)["wandb_id"],
        resume="allow",
        dir=str(run.root),
        mode=None if _has_wandb_key() else "offline",
        settings={"silent": True},
    )
    tracker.start()
    tracker.store_init_configuration(recipe.to_dict())
    wandb_run = tracker.tracker
    for axis in ("train/step", "train/tokens", "train/device_hours", "energy/total_kwh"):
        wandb_run.define_metric(axis)
    for pattern, axis in _AXES.items():
        wandb_run.define_metric(pattern, step_metric=axis)
    wandb_run.define_metric("eval/*", step_metric=_EVAL_AXIS)
    wandb_run.define_metric("eval/loss", step_metric=_EVAL_AXIS, summary="min")
    return tracker


def _has_wandb_key() -> bool:
    """Whether W&B can go online without asking for a key; WANDB_MODE still overrides."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
