"""Every row of metrics into metrics.jsonl, and on to trackers that may fail without the training noticing."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.config import Recipe
from moe.parallel import ranks
from moe.rundir import MetricsWriter, RunDir
from moe.tracking.trackers import open_tracker

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

__all__ = ["Tracking"]


class Tracking:
    """Writes rows of metrics. On ranks other than the first every call does nothing.

    A tracker that is not installed, cannot start or raises later is named on stderr in one sentence and gets nothing
    more; metrics.jsonl has every row, and `moe runs track` sends them again.

    Args:
        segment: number of this process lifetime in the run's ledger.
        resumed_step: optimizer step this segment starts from.
    """

    def __init__(self, recipe: Recipe, run: RunDir, *, segment: int, resumed_step: int) -> None:
        self._writer: MetricsWriter | None = None
        self._trackers: dict[str, GeneralTracker] = {}
        self._first_steps: dict[str, int] = {}  # of each tracker: earlier steps it has, and cannot take back
        self._run = run
        if not ranks.is_first():
            return
        logged_step = _last_logged_step(run.metrics)
        self._writer = MetricsWriter(run.metrics, segment=segment, resumed_step=resumed_step)
        for name in recipe.tracking.trackers:
            tracker = self._try(name, open_tracker, name, recipe, run, resumed_step)
            if tracker is not None:
                self._trackers[name] = tracker
                self._first_steps[name] = self._try(name, _first_step, name, tracker, logged_step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one row; it must hold `train/step`."""
        if self._writer is None:
            return
        self._writer.append(row)
        step = row["train/step"]
        for name, tracker in list(self._trackers.items()):
            if step >= self._first_steps[name]:
                self._try(name, tracker.log, dict(row), step=step)

    def sync(self) -> None:
        """Put metrics.jsonl on the disk."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """Close metrics.jsonl, then every tracker; W&B may take a minute to send what it holds."""
        if self._writer is not None:
            self._writer.close()
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What the call returns; None, a sentence and one tracker less when it raises."""
        try:
            return call(*arguments, **options)
        except Exception as error:  # whatever another project raises, training goes on
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"tracker {name} is left out from here on ({reason}); {self._run.metrics} has every row, and "
                f"`moe runs track {self._run.root} --to {name}` sends them again",
                file=sys.stderr,
                flush=True,
            )
            return None


def _first_step(name: str, tracker: "GeneralTracker", logged_step: int) -> int:
    """From which step on a tracker is sent rows, where earlier segments have logged up to `logged_step`.

    W&B says what its server has: nothing offline, and after a kill less than was logged.
    """
    if name == "trackio":
        return logged_step + 1
    return int(tracker.tracker.starting_step) if name == "wandb" else 0


def _last_logged_step(metrics: Path) -> int:
    """The highest step any earlier segment wrote down, lost work included; -1 when there is none."""
    if not metrics.is_file():
        return -1
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        found = (re.search(r'"train/step": (\d+)', line) for line in lines if '"resumed_step"' not in line)
        return max((int(match[1]) for match in found if match), default=-1)
