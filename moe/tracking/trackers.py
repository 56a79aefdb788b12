"""Opening W&B, trackio and TensorBoard on a run, through accelerate's trackers; each is imported when asked for.

A resumed run continues where it was: under the same id in W&B and trackio, in the same folder of TensorBoard. Of steps
that are done twice TensorBoard shows the second ones; W&B and trackio cannot take back what they were given, and keep
the first.
"""

import importlib.util
import json
import netrc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from moe.config import Recipe
from moe.errors import ConfigError
from moe.rundir import RunDir, write_json

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["new_identity", "open_tracker"]

_AXES = ("train/step", "train/tokens", "train/device_hours", "energy/total_kwh")  # what a chart may be drawn against
_START_S = 30  # how long a start waits for W&B's server to answer, before it goes on without
_FINISH_S = 60  # how long the end of a run waits for W&B's upload; what is missing then, `wandb sync` sends


def open_tracker(name: str, recipe: Recipe, run: RunDir, resumed_step: int) -> "GeneralTracker":
    """The tracker `name` on this run, with the recipe as its configuration.

    Raises ConfigError when its package is missing, and whatever the package raises when it cannot start.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"tracking.trackers={name} needs the package {name}: pip install {name}, or use none")
    from accelerate import PartialState

    PartialState()  # accelerate's trackers ask it who they are; a trainer has made it already
    if name == "wandb":
        return _open_wandb(recipe, run)
    if name == "trackio":
        return _open_trackio(recipe, run)
    return _open_tensorboard(recipe, run, resumed_step)


def new_identity(name: str, recipe: Recipe, run: RunDir) -> str:
    """Give the run a new id in the tracker `name` and remember it in tracking.json."""
    identity = f"{recipe.run.name}-{os.urandom(4).hex()}"
    write_json(_identities(run), {**_read_identities(run), name: identity})
    return identity


def _identity(name: str, recipe: Recipe, run: RunDir) -> str:
    return _read_identities(run).get(name) or new_identity(name, recipe, run)


def _identities(run: RunDir) -> Path:
    return run.root / "tracking.json"


def _read_identities(run: RunDir) -> dict[str, Any]:
    return run.read_json(_identities(run)) if _identities(run).is_file() else {}


def _open_wandb(recipe: Recipe, run: RunDir) -> "GeneralTracker":
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        recipe.tracking.project,
        name=recipe.run.name,
        id=_identity("wandb", recipe, run),
        resume="allow",
        dir=str(run.root),
        mode=None if _has_wandb_key() else "offline",
        settings={"silent": True, "init_timeout": _START_S, "finish_timeout": _FINISH_S},
    )
    tracker.start()
    tracker.store_init_configuration(recipe.to_dict())
    define = tracker.tracker.define_metric
    for group in ("train", "router", "energy", "efficiency"):
        define(f"{group}/*", step_metric="train/step")
    define("eval/*", step_metric="train/tokens")
    # a metric defined by name takes nothing from its group's line, its axis neither
    define("eval/loss", step_metric="train/tokens", summary="min")
    for axis in _AXES:
        define(axis)
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


def _open_trackio(recipe: Recipe, run: RunDir) -> "GeneralTracker":
    """In trackio's own folder (TRACKIO_DIR), where its dashboard looks. It finds a run by name, so that is the id."""
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(
        recipe.tracking.project,
        name=_identity("trackio", recipe, run),
        config=recipe.to_dict(),
        resume="allow",
        embed=False,
        auto_log_gpu=False,  # the meter reads the devices, and only this run's
        auto_log_cpu=False,
    )
    tracker.start()
    return tracker


def _open_tensorboard(recipe: Recipe, run: RunDir, resumed_step: int) -> "GeneralTracker":
    from accelerate.tracking import TensorBoardTracker

    # readers forget, of earlier files, the steps from here on
    purge_step = resumed_step + 1 if resumed_step else 0
    tracker = TensorBoardTracker("tensorboard", run.root, purge_step=purge_step)
    tracker.start()
    # not accelerate's hyperparameters: they are flat, and make a run of their own at every start
    tracker.tracker.add_text("config", f"```json\n{json.dumps(recipe.to_dict(), indent=2)}\n```", resumed_step)
    return tracker
