"""Numbers that know how well they are known: a value within a band, with unit, source, scope and method."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Interval", "Quantity"]


@dataclass(frozen=True)
class Interval:
    """A number between `low` and `high`. `value` is None where only the range is known.
    Only prices may be below 0.

    >>> Interval(2.0, 1.0, 3.0) * Interval(10.0, 10.0, 20.0)
    Interval(value=20.0, low=10.0, high=60.0)
    """

    value: float | None
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> "Interval":
        """A number without a band."""
        return cls(value, value, value)

    def __mul__(self, other: "Interval") -> "Interval":
        value = None if self.value is None or other.value is None else self.value * other.value
        ends = [mine * its for mine in (self.low, self.high) for its in (other.low, other.high)]
        return Interval(value, min(ends), max(ends))

    def __truediv__(self, other: "Interval") -> "Interval":
        """One of at least 0 by one above 0."""
        value = None if self.value is None or other.value is None else self.value / other.value
        return Interval(value, self.low / other.high, self.high / other.low)

    def __add__(self, other: "Interval") -> "Interval":
        value = None if self.value is None or other.value is None else self.value + other.value
        return Interval(value, self.low + other.low, self.high + other.high)

    def scaled(self, by: float) -> "Interval":
        """Times an exact number."""
        return self * Interval.exactly(by)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number of a footprint.

    source   where the energy and each factor come from, joined with "; "
    scope    what the number covers: `gpu` or `node` as metered, `facility of gpu` with a PUE, `reserved devices`
    method   the formula, in words
    energy   "measured" or "estimate" where the number is made of the run's energy, None where it is not
    """

    amount: Interval
    unit: str
    source: str
    scope: str
    method: str
    energy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The number as `moe energy report --json` prints it."""
        amount = self.amount
        return {
            "value": amount.value,
            "low": amount.low,
            "high": amount.high,
            "unit": self.unit,
            "source": self.source,
            "scope": self.scope,
            "method": self.method,
            "energy": self.energy,
        }

    def times(self, factor: Interval, *, unit: str, source: str, method: str, scope: str | None = None) -> "Quantity":
        """This number times a factor: the factor's source joins, what the energy is stays."""
        return Quantity(
            amount=self.amount * factor,
            unit=unit,
            source=f"{self.source}; {source}",
            scope=scope or self.scope,
            method=method,
            energy=self.energy,
        )
