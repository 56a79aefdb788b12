"""What a comparison found, as plain data: every run with its crossing and its ratios, and all of it as one JSON object.

The table, the page and the sentences are made from this and know of nothing above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe.compare.equal_loss import Crossing, Ratio, scores
from moe.compare.runs import Run

__all__ = ["Entry", "Result"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run in a comparison. `ratios` are the ladder's cost over this run's.

    A baseline has none; of runs that differ in seed alone, which are compared by their medians, only the first has.
    """

    run: Run
    role: str  # "run" or "baseline"
    crossing: Crossing
    ratios: Mapping[str, Ratio]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Runs and baselines at one loss. Energy is an axis only when every side measured it at the same scope."""

    entries: tuple[Entry, ...]
    at_loss: float
    unit: str
    same_data: bool
    axes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ratios(self) -> Mapping[str, Ratio]:
        """The first run's ratios: the headline. The other runs' are with their entries."""
        return self.entries[0].ratios

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps(…, allow_nan=False)`; an interval's open end is null."""
        return {
            "at_loss": self.at_loss,
            "unit": self.unit,
            "same_data": self.same_data,
            "cost_axes": list(self.axes),
            "runs": [_run_json(entry, self.unit, self.axes) for entry in self.entries],
            "ratios": {axis: _ratio_json(ratio) for axis, ratio in self.ratios.items()},
            "notes": list(self.notes),
        }


def _run_json(entry: Entry, unit: str, axes: Sequence[str]) -> dict[str, Any]:
    run, costs = entry.run, entry.crossing.costs

    def at(axis: str) -> float | None:
        return costs[axis].value if axis in costs and axis in axes else None

    return {
        "name": run.name,
        "role": entry.role,
        "parameters_total": run.parameters_total,
        "parameters_active": run.parameters_active,
        "flops_per_token": run.flops_per_token,
        "tokens": run.tokens,
        "tokens_processed": run.tokens_processed,
        "device_hours": run.device_hours,
        "useful_device_hours": run.useful_device_hours,
        "energy_j": run.energy_j,
        "energy_source": run.energy_source,
        "energy_scope": run.energy_scope,
        "energy_band_j": run.energy_band_j,
        "coverage": run.coverage,
        "hardware": run.hardware,
        "eval_loss": scores(run, unit)[-1][0],
        "at_loss": {
            "loss": entry.crossing.loss,
            "reached": entry.crossing.reached,
            "tokens": at("tokens"),
            "device_hours": at("device_hours"),
            "energy_j": at("energy"),
        },
        "ratios": {axis: _ratio_json(ratio) for axis, ratio in entry.ratios.items()},
    }


def _ratio_json(ratio: Ratio) -> dict[str, Any]:
    return {
        **asdict(ratio.span),
        "n": ratio.n,
        "method": ratio.method,
        "run": ratio.run,
        "baseline": ratio.baseline,
    }
