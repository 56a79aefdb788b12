"""What one run is and holds: model, data and schedule, both loss curves, cost, checkpoints, command."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe import accounting
from moe.config import Recipe
from moe.energy import fold_ledgers
from moe.errors import CompareError, ConfigError
from moe.rundir import RunDir, read_metrics
from moe.runs.checkpoints import Checkpoint, check_sizes, read_checkpoints
from moe.runs.status import RunStatus, read_status

__all__ = ["RunDetails", "read_details"]


@dataclass(frozen=True, kw_only=True)
class RunDetails:
    """One run on a page. Loss curves are (step, nats per token); `cost` is `total` of `moe energy report --json`."""

    status: RunStatus
    parameters_total: int
    parameters_active: int
    recipe: Recipe
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    train_losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]
    cost: Mapping[str, Any]
    cost_notes: list[str]
    checkpoints: list[Checkpoint]

    def to_json(self) -> dict[str, Any]:
        """As `moe runs show --json` prints it."""
        return {
            **vars(self),
            "status": vars(self.status),
            "recipe": self.recipe.to_dict(),
            "checkpoints": [vars(checkpoint) for checkpoint in self.checkpoints],
        }


def read_details(path: Path, check: Callable[[Path], None] | None = None) -> RunDetails:
    """Read the run at `path`; `check` as in `read_checkpoints`.

    Raises CompareError, ConfigError or LedgerError, in one sentence, when it is no run or a file of it is broken.
    """
    run = RunDir.existing(path)
    status = read_status(path)
    if status.problem:
        raise CompareError(status.problem)
    try:
        recipe = Recipe.read(run.config)
    except ConfigError as error:
        raise CompareError(str(error)) from None
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    fold = fold_ledgers(run.ledgers()) if run.ledgers() else None
    return RunDetails(
        status=status,
        parameters_total=accounting.num_parameters(recipe.model),
        parameters_active=accounting.num_parameters(recipe.model, active=True),
        recipe=recipe,
        data=run.read_json(run.data) if run.data.is_file() else {},
        environment=run.read_json(run.environment) if run.environment.is_file() else {},
        train_losses=[(row["train/step"], row["train/loss"]) for row in rows if "train/loss" in row],
        eval_losses=[(row["train/step"], row["eval/loss"]) for row in rows if "eval/loss" in row],
        cost=vars(fold.total) if fold else {},
        cost_notes=fold.notes if fold else [],
        checkpoints=read_checkpoints(run, check or check_sizes),
    )
