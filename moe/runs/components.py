"""Where a run's steps spent time and energy, by component of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe.energy import Fold
from moe.energy.components import share_steps
from moe.energy.phases import STEP_PHASES
from moe.rundir import RunDir, read_metrics

__all__ = ["Components", "read_components"]

_PREFIX = "efficiency/step_s/"


@dataclass(frozen=True, kw_only=True)
class Components:
    """Energy of all steps, redone ones included, apportioned by the time of those that were split.

    energy_mj   by component; they sum to the energy of the phases data, forward_backward and optimizer
    step_s      seconds of each in a step, mean over `num_steps` that were split on the first rank
    """

    energy_mj: Mapping[str, int]
    step_s: Mapping[str, float]
    num_steps: int

    def to_json(self) -> dict[str, Any]:
        """As `moe energy report --json` prints it."""
        parts = {name: {"energy_j": mj / 1000, "step_s": self.step_s[name]} for name, mj in self.energy_mj.items()}
        return {"apportioned_by": "time", "of_phases": sorted(STEP_PHASES), "num_steps": self.num_steps, "parts": parts}


def read_components(run: RunDir, fold: Fold) -> Components | None:
    """The components of a run whose ledgers were folded; None when no step of it was split.

    Raises CompareError for metrics that cannot be read.
    """
    rows = [row for row in read_metrics(run.metrics) if _PREFIX + "other" in row] if run.metrics.is_file() else []
    if not rows:
        return None
    names = dict.fromkeys(name.removeprefix(_PREFIX) for row in rows for name in row if name.startswith(_PREFIX))
    step_s = {name: sum(row.get(_PREFIX + name, 0.0) for row in rows) / len(rows) for name in names}
    return Components(energy_mj=share_steps(fold.phases, step_s), step_s=step_s, num_steps=len(rows))
