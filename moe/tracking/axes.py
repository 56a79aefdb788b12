"""What metrics are drawn against: steps, tokens, device-hours or energy."""

from collections.abc import Mapping
from typing import Any

__all__ = ["AXES", "Axes"]

AXES = ("train/step", "train/tokens", "train/device_hours", "energy/total_kwh")


class Axes:
    """Completes rows: a tracker can draw a value only against what stands in the same row.

    A row without one of the axes gets the value of the last row that had it. An evaluation follows the training step
    it belongs to, so its cost is that step's; before the first step nothing is known, and nothing is made up.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def complete(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`row` with every axis that is known."""
        self._last |= {axis: row[axis] for axis in AXES if axis in row}
        return {**self._last, **row}
