"""A tracker's run made again from metrics.jsonl: a tracker is a view, and the run directory holds what it shows."""

from moe.config import Recipe
from moe.errors import ConfigError, MoEError
from moe.rundir import RunDir, read_metrics
from moe.tracking.trackers import new_identity, open_tracker

__all__ = ["rebuild"]


def rebuild(run: RunDir, name: str) -> int:
    """Send the final lineage of a run's metrics to the tracker `name`, and return how many rows that was.

    In W&B and trackio it becomes a new run, which a resume then continues; TensorBoard forgets what it had. Raises
    ConfigError, in one sentence, when the tracker is not installed or fails, and CompareError when the run has no rows.
    """
    recipe = Recipe.read(run.config)
    rows = read_metrics(run.metrics)
    try:
        new_identity(name, recipe, run)
        tracker = open_tracker(name, recipe, run, resumed_step=0)
        for row in rows:
            tracker.log(row, step=row["train/step"])
        tracker.finish()
    except MoEError:
        raise
    except Exception as error:  # whatever another project raises
        raise ConfigError(f"tracker {name} failed ({' '.join(str(error).split())}); mend that and try again") from error
    return len(rows)
