"""Grid intensities and prices that change with time, joined with the run's energy.

    mean = sum over intervals of (energy in the interval x its value) / energy in all of them

is a factor like any other: energy x mean is the sum over intervals. Energy that no interval covers has the series' own
minimum and maximum as its bounds, and the mean of the rest as its value.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import NamedTuple

from moe.energy.footprint.factors import Factor
from moe.energy.footprint.profile import EnergyProfile
from moe.energy.footprint.quantity import Interval
from moe.errors import ConfigError

__all__ = ["Joined", "Point", "Series"]


class Point(NamedTuple):
    """A value that holds from `start_ns` to `end_ns` (nanoseconds of UTC since 1970)."""

    start_ns: int
    end_ns: int
    value: float


class Joined(NamedTuple):
    """A point that overlaps the run, and the millijoules the run used in it."""

    point: Point
    energy_mj: float


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points in order, none overlapping the next.

    kind   of a grid series: average or marginal, lifecycle or direct, as far as the file says
    """

    name: str
    points: tuple[Point, ...]
    unit: str
    kind: str
    source: str
    notes: tuple[str, ...] = ()

    @classmethod
    def from_points(
        cls, name: str, points: Iterable[Point], *, unit: str, kind: str, source: str, notes: tuple[str, ...] = ()
    ) -> "Series":
        """Sorts the points and checks them. Raises ConfigError that names the file and the moment."""
        ordered = sorted(set(points))
        if not ordered:
            raise ConfigError(f"series {name} holds no value: give one that covers the time of the run")
        for point, after in zip(ordered, [*ordered[1:], None], strict=True):
            if not isfinite(point.value) or (point.value < 0 and kind != "price"):  # markets do pay for taking power
                wanted = "a price is a number" if kind == "price" else "a value is at least 0"
                raise ConfigError(f"series {name} has {point.value:g} at {_utc(point.start_ns)}: {wanted}")
            if after is not None and after.start_ns < point.end_ns:
                raise ConfigError(f"series {name} has two values for {_utc(after.start_ns)}: keep one")
        return cls(name=name, points=tuple(ordered), unit=unit, kind=kind, source=source, notes=notes)

    def join(self, profile: EnergyProfile) -> list[Joined]:
        """The points that overlap the run, each with the energy used in it."""
        first = max(0, bisect_right(self.points, profile.start_ns, key=lambda point: point.start_ns) - 1)
        joined = []
        for point in self.points[first:]:
            if point.start_ns >= profile.end_ns:
                break
            if point.end_ns > profile.start_ns:
                joined.append(Joined(point, profile.between(point.start_ns, point.end_ns)))
        return joined

    def over(self, profile: EnergyProfile, energy_mj: int) -> Factor:
        """The mean over the run's energy as a factor. Raises ConfigError when the series misses the run altogether."""
        if not energy_mj:
            raise ConfigError(f"series {self.name} cannot be joined with a run that used no energy: give a number")
        joined = self.join(profile)
        if not joined:
            raise ConfigError(
                f"series {self.name} covers {_utc(self.points[0].start_ns)} to {_utc(self.points[-1].end_ns)} but the "
                f"run lasted from {_utc(profile.start_ns)} to {_utc(profile.end_ns)}: give a series of that time"
            )
        covered_mj = sum(part.energy_mj for part in joined)
        mean = sum(part.energy_mj * part.point.value for part in joined) / covered_mj if covered_mj else None
        missing = 1 - covered_mj / energy_mj
        amount, notes = Interval(mean, mean or 0.0, mean or 0.0), self.notes
        if missing > 1e-9:  # less is what rounding leaves
            low, high = min(point.value for point in self.points), max(point.value for point in self.points)
            known = amount.scaled(1 - missing)
            amount = Interval(mean, known.low + low * missing, known.high + high * missing)
            notes += (
                f"series {self.name} has no value for {missing:.2%} of the run's energy: bounded by the series' own "
                f"{low:g} to {high:g} {self.unit}",
            )
        return Factor(
            name=self.name,
            amount=amount,
            unit=self.unit,
            kind=self.kind,
            year=_utc(joined[0].point.start_ns)[:4],
            source=self.source,
            licence="the file's own",
            notes=notes,
        )


def _utc(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%MZ")
