"""Factors: numbers that turn energy and hours into something else, each with its range, year, source and licence.

They ship as small tables beside this file, copied fact by fact from the sources named in each row; docs/footprint.md
lists them all. A user's own number is a factor too, with the source "stated". No factor is ever filled in: what nobody
stated is either absent from a report or a range over a table.
"""

import csv
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from moe.energy.footprint.quantity import Interval
from moe.errors import ConfigError

__all__ = ["TABLES", "Factor", "factor_of", "matching", "number", "range_over", "stated", "table"]

TABLES = ("grid_carbon", "grid_water", "pue", "wue", "hardware", "everyday")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One row of a table, or a number the user stated.

    kind    what the number is, inside its table: `average, lifecycle`, `consumed`, `cooling`, `embodied_server` …
    code    how it is asked for (hardware: a regular expression of the name the driver gives); `also` lists other words
    amount  in `unit`; where the source gives no range, low and high are the value
    notes   sentences a reader of the number should see
    """

    name: str
    amount: Interval
    unit: str
    source: str
    kind: str = ""
    code: str = ""
    also: tuple[str, ...] = ()
    year: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Everything this factor answers to, in lower case."""
        return tuple(word.casefold() for word in (self.code, *self.also, self.name))

    def to_json(self) -> dict[str, Any]:
        """The factor as `moe energy report --json` prints it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "value": self.amount.value,
            "low": self.amount.low,
            "high": self.amount.high,
            "unit": self.unit,
            "year": self.year,
            "source": self.source,
            "licence": self.licence,
        }


@cache
def table(name: str) -> tuple[Factor, ...]:
    """The rows of one of TABLES."""
    text = (files("moe.energy.footprint") / "tables" / f"{name}.csv").read_text(encoding="utf-8")
    return tuple(_row(row) for row in csv.DictReader(text.splitlines()))


def _row(row: dict[str, str]) -> Factor:
    value = float(row["value"]) if row["value"] else None
    low, high = (float(row[end] or row["value"]) for end in ("low", "high"))  # a row without a value gives both
    also = tuple(row["also"].split(";")) if row["also"] else ()
    return Factor(
        name=row["name"],
        amount=Interval(value, low, high),
        unit=row["unit"],
        source=row["source"],
        kind=row["kind"],
        code=row["code"],
        also=also,
        year=row["year"],
        licence=row["licence"],
    )


def factor_of(option: str, name: str, word: str, kinds: Iterable[str] = (), hint: str = "a number") -> Factor:
    """The row of table `name` that answers to `word`, of one of `kinds` (of any, when empty).

    Raises ConfigError that names the nearest row and `hint`, what else the option takes.
    """
    rows = [row for row in table(name) if not kinds or row.kind in kinds]
    for row in rows:
        if word.casefold() in row.words:
            return row
    near = difflib.get_close_matches(word.casefold(), [spelt for row in rows for spelt in row.words], n=1, cutoff=0)
    row = next(row for row in rows if near[0] in row.words)
    raise ConfigError(
        f"{option} {word} is in no row of the shipped table: the nearest is {row.code} ({row.name}); {hint}"
    )


def matching(kind: str, device_name: str) -> Factor | None:
    """The row of the hardware table for a device, by the name the driver gives; None when it is not listed."""
    rows = (row for row in table("hardware") if row.kind == kind)
    return next((row for row in rows if re.search(row.code, device_name)), None)


def range_over(rows: Iterable[Factor], name: str) -> Factor:
    """What is known when nobody says which row: the range over all of them, and no value."""
    rows = tuple(rows)
    first = rows[0]
    low = min(row.amount.low for row in rows)
    high = max(row.amount.high for row in rows)
    return Factor(
        name=name,
        amount=Interval(None, low, high),
        unit=first.unit,
        kind=first.kind,
        year=f"{min(row.year for row in rows)}-{max(row.year for row in rows)}",
        source=f"range over {len(rows)} rows: {first.source}",
        licence=first.licence,
    )


def number(word: str | float) -> float | None:
    """`word` as a number, None when it is not one."""
    try:
        return float(word)
    except ValueError:
        return None


def stated(option: str, value: float, unit: str, kind: str = "", at_least: float = 0.0) -> Factor:
    """A factor the user stated. Raises ConfigError for one that cannot be."""
    if not at_least <= value < math.inf:
        raise ConfigError(f"{option} {value:g} must be a number of at least {at_least:g} ({unit}): correct it")
    return Factor(name="stated", amount=Interval.exactly(value), unit=unit, kind=kind, source=f"stated: {option}")
