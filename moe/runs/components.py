"""Where a run's steps spent time and energy, by component of the model."""

import math
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
    """The components of a run whose ledgers were folded; None when no step of it was split, or no part took time.

    A split with anything but times in it counts as none. Raises CompareError for metrics that cannot be read.
    """
    splits = [_split(row) for row in read_metrics(run.metrics)] if run.metrics.is_file() else []
    splits = [split for split in splits if "other" in split and all(map(_is_time, split.values()))]
    names = dict.fromkeys(name for split in splits for name in split)
    step_s = {name: sum(split.get(name, 0.0) for split in splits) / len(splits) for name in names}
    energy_mj = share_steps(fold.phases, step_s)
    return Components(energy_mj=energy_mj, step_s=step_s, num_steps=len(splits)) if energy_mj else None


def _split(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the metrics tells of each component; `other` is only in those of steps that were split."""
    return {name.removeprefix(_PREFIX): value for name, value in row.items() if name.startswith(_PREFIX)}


def _is_time(value: object) -> bool:
    """Whether a value of a metrics file, which anything may have written, is a number of seconds."""
    return isinstance(value, int | float) and 0 <= value < math.inf
