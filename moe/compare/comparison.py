"""Comparing runs with baselines: unit, target loss, crossings and ratios; and the object that shows what was found."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe.compare import sentences
from moe.compare.equal_loss import AXES, UNITS, Crossing, Side, cheapest_ratio, cross, reachable
from moe.compare.result import Entry, Result
from moe.compare.runs import Run, load_runs, same_part
from moe.errors import CompareError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "compare"]


class Comparison(Result):
    """Runs and baselines at one loss (see `Result`), to read as values, JSON, a terminal table or a page."""

    def table(self) -> "Table":
        """The comparison as a rich table."""
        from moe.compare.table import build_table

        return build_table(self)

    def write_html(self, path: str | Path) -> None:
        """Write one self-contained page, aside and renamed. Raises CompareError when it cannot be written."""
        from moe.compare.html import write_html

        write_html(self, Path(path))


def compare(
    runs: Sequence[str | Path], baselines: Sequence[str | Path] = (), at_loss: float | None = None
) -> Comparison:
    """Compare run directories with baselines at the loss `at_loss`, in the unit the comparison ends up with.

    Without `at_loss` the highest loss is taken that a run can vouch for at its best: the lowest loss that every run
    reached with 1.96 standard errors of its evaluation to spare, so that each interval is closed.
    Raises CompareError when a directory is not a run, has no evaluation or ledger, or shares no unit with the others.
    """
    if not runs:
        raise CompareError("there is no run to compare; give at least one run directory")
    if at_loss is not None and not math.isfinite(at_loss):
        raise CompareError(f"--at-loss {at_loss} must be a finite number")
    loaded = load_runs([*runs, *baselines])
    same_data, unit = _unit(loaded)
    target = max(reachable(run, unit) for run in loaded) if at_loss is None else at_loss
    crossings = [cross(run, unit, target) for run in loaded]
    axes = tuple(axis for axis in AXES if axis != "energy" or _energy_comparable(loaded))
    ladder = list(_sides(loaded[len(runs) :], crossings[len(runs) :]).values())
    sides = {side.runs[0].path: side for side in _sides(loaded[: len(runs)], crossings[: len(runs)]).values()}
    entries = []
    for index, (run, crossing) in enumerate(zip(loaded, crossings, strict=True)):
        role = "run" if index < len(runs) else "baseline"
        side = sides.get(run.path)
        found = {axis: cheapest_ratio(axis, side, ladder) for axis in axes} if side else {}
        ratios = {axis: ratio for axis, ratio in found.items() if ratio is not None}
        entries.append(Entry(run=run, role=role, crossing=crossing, ratios=ratios))
    notes = sentences.notes(entries, target, unit, same_data, axes)
    return Comparison(
        entries=tuple(entries), at_loss=target, unit=unit, same_data=same_data, axes=axes, notes=tuple(notes)
    )


def _sides(runs: Sequence[Run], crossings: Sequence[Crossing]) -> dict[str, Side]:
    """Runs grouped with those that differ in seed (and name) and in nothing else; a repeated seed stands alone."""
    sides: dict[str, Side] = {}
    for run, crossing in zip(runs, crossings, strict=True):
        recipe = {name: section for name, section in run.recipe.to_dict().items() if name != "run"}
        key = json.dumps([recipe, dict(run.data), run.hardware], sort_keys=True)
        before = sides.get(key, Side((), ()))
        if run.recipe.run.seed in [other.recipe.run.seed for other in before.runs]:
            key, before = str(run.path), Side((), ())
        sides[key] = Side((*before.runs, run), (*before.crossings, crossing))
    return sides


def _unit(runs: Sequence[Run]) -> tuple[bool, str]:
    """Whether all runs share tokenizer and evaluated text, and the unit their losses can be compared in."""
    keys = [tuple(run.data.get(key) for key in ("validation_sha256", "tokenizer_sha256")) for run in runs]
    recorded = None not in keys[0] and len(set(keys)) == 1
    if len(runs) == 1 or (recorded and same_part(runs)):
        return True, UNITS[0]
    for run in runs:
        if any(point.bits_per_byte is None for point in run.curve):
            raise CompareError(
                "the runs differ in tokenizer or evaluated text, so only bits per byte could compare them, and "
                f"{run.name} has an evaluation without eval/bits_per_byte"
            )
    return False, UNITS[1]


def _energy_comparable(runs: Sequence[Run]) -> bool:
    """A total that joins scopes ("gpu+node") is comparable with nothing, not even with its like."""
    scopes = {run.energy_scope for run in runs}
    return all(run.measured for run in runs) and len(scopes) == 1 and "+" not in scopes.pop()
