"""When energy was used: joins readings of many ledgers with the clock that grids and prices go by."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from moe.energy.fold import Fold

__all__ = ["EnergyProfile", "Piece"]


class Piece(NamedTuple):
    """One device from one moment of its clock to another: `upto` is its millijoules up to a moment between them."""

    start_ns: int
    end_ns: int
    utc_offset_ns: int
    upto: Callable[[int], float]

    def before(self, utc_ns: int) -> float:
        moment = min(max(utc_ns - self.utc_offset_ns, self.start_ns), self.end_ns)
        return self.upto(moment) - self.upto(self.start_ns)


class EnergyProfile:
    """Cumulative energy over UTC nanoseconds; between two readings it grows evenly.

    `start_ns` and `end_ns` are the first and last moment known. Splitting a ledger into segments changes nothing.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = list(pieces)
        self.start_ns = min((piece.start_ns + piece.utc_offset_ns for piece in self._pieces), default=0)
        self.end_ns = max((piece.end_ns + piece.utc_offset_ns for piece in self._pieces), default=0)

    @classmethod
    def of_run(cls, fold: Fold) -> "EnergyProfile":
        """That of one folded run, what a killed segment lost included."""
        pieces = []
        for file in fold.files:
            for position, segment in enumerate(file.segments):
                pieces += [
                    Piece(line.times_ns[0], line.times_ns[-1], segment.utc_offset_ns, line.energy_at)
                    for line in segment.lines.values()
                    if line.times_ns
                ]
                pieces += [
                    Piece(lost.start_ns, lost.end_ns, lost.utc_offset_ns, lost.upto) for lost in file.lost(position)
                ]
        return cls(pieces)

    @classmethod
    def of_stretches(cls, stretches: Iterable[tuple[int, int, int]]) -> "EnergyProfile":
        """Of (start_ns, end_ns, millijoules) in UTC, each used evenly."""
        return cls(
            Piece(start_ns, end_ns, 0, partial(_evenly, start_ns, end_ns, energy_mj))
            for start_ns, end_ns, energy_mj in stretches
        )

    def before(self, utc_ns: int) -> float:
        """Millijoules used up to a moment."""
        return sum(piece.before(utc_ns) for piece in self._pieces)

    def between(self, start_ns: int, end_ns: int) -> float:
        """Millijoules used from one moment to another."""
        return self.before(end_ns) - self.before(start_ns)


def _evenly(start_ns: int, end_ns: int, energy_mj: int, at_ns: int) -> float:
    return energy_mj * (at_ns - start_ns) / (end_ns - start_ns)
