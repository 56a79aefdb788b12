"""What a node used over time, as pieces of known energy; between two pieces nothing is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

__all__ = ["NodeSeries", "Piece"]

HOLE_FACTOR = 3  # power readings further apart than this many usual distances say nothing about the time between


@dataclass(frozen=True)
class Piece:
    """A stretch of UTC (nanoseconds since 1970) and the joules used in it."""

    start_ns: int
    end_ns: int
    energy_j: float

    def share(self, start_ns: int, end_ns: int) -> float:
        """How much of the piece lies between two moments, from 0 to 1: its energy is shared out by time."""
        overlap_ns = min(end_ns, self.end_ns) - max(start_ns, self.start_ns)
        return max(0.0, overlap_ns / (self.end_ns - self.start_ns))


@dataclass(frozen=True)
class NodeSeries:
    """One node's pieces in order of time. `host` None: the source does not say which node, or covers them all.

    source  node:csv | node:ipmi | node:redfish | node:slurm | node:pm_counters
    """

    source: str
    host: str | None
    pieces: tuple[Piece, ...]

    @classmethod
    def from_power(cls, source: str, host: str | None, points: Sequence[tuple[int, float]]) -> "NodeSeries":
        """From (utc_ns, watts): a trapezoid between neighbours, a hole where they are unusually far apart."""
        pairs = [(a, b) for a, b in pairwise(sorted(points)) if b[0] > a[0]]
        usual_ns = median([b[0] - a[0] for a, b in pairs]) if pairs else 0
        return cls(
            source,
            host,
            tuple(
                Piece(a_ns, b_ns, (a_w + b_w) / 2 * (b_ns - a_ns) / 1e9)
                for (a_ns, a_w), (b_ns, b_w) in pairs
                if b_ns - a_ns <= HOLE_FACTOR * usual_ns
            ),
        )

    @classmethod
    def from_counter(cls, source: str, host: str | None, points: Sequence[tuple[int, float]]) -> "NodeSeries":
        """From (utc_ns, joules so far): the differences; where the counter fell, a hole."""
        pairs = pairwise(sorted(points, key=lambda point: point[0]))
        return cls(
            source,
            host,
            tuple(Piece(a_ns, b_ns, b_j - a_j) for (a_ns, a_j), (b_ns, b_j) in pairs if b_ns > a_ns and b_j >= a_j),
        )
