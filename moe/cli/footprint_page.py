"""Energies and footprints as lines of text for people: units, bands, factors, grouped by scope."""

from typing import TYPE_CHECKING

from moe.cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.text import Text

    from moe.energy.footprint import Footprint
    from moe.energy.footprint.quantity import Interval, Quantity

__all__ = ["joules", "print_footprint", "row"]

# what is printed in larger units from a thousand on, and a thousand of it
_LARGER = {"gCO2e": "kgCO2e", "kgCO2e": "tCO2e", "g": "kg", "kWh": "MWh", "MWh": "GWh", "L": "m3"}


def joules(energy_j: float | None) -> str:
    """Joules, from 36 kJ on as kWh."""
    if energy_j is None:
        return "not known"
    return f"{energy_j:,.1f} J" if energy_j < 36_000 else f"{energy_j / 3.6e6:,.4g} kWh"


def row(*words: str) -> list["Text"]:
    """Cells that are neither markup nor able to steer the terminal: a ledger may come from anywhere."""
    from rich.text import Text

    return [Text(printable(word)) for word in words]


def print_footprint(console: "Console", footprint: "Footprint") -> None:
    """The numbers by scope, and the factors they were made with."""
    from rich.table import Table

    scopes: dict[str, list[tuple[str, Quantity]]] = {}
    for name, number in footprint.numbers.items():
        scopes.setdefault(_scope(number), []).append((name, number))
    for scope, listed in scopes.items():
        listing = Table.grid(padding=(0, 2))
        for name, number in listed:
            listing.add_row(*row(f"  {_words(name)}", *_cells(number)))
        console.print()
        console.print(*row(f"footprint, {scope}"))
        console.print(listing)
    if footprint.factors:
        console.print("\nfactors")
    for line in row(*_factors(footprint)):
        console.print(line)


def _scope(number: "Quantity") -> str:
    return f"{number.scope}, the energy an estimate" if number.energy == "estimate" else number.scope


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cells(number: "Quantity") -> tuple[str, str]:
    """The number with its unit, and its band where it has one beside the value."""
    amount, unit, scale = number.amount, number.unit, 1.0
    while unit in _LARGER and amount.high * scale >= 1000:
        unit, scale = _LARGER[unit], scale / 1000
    amount = amount.scaled(scale)
    band = _band(amount)
    return (f"{band} {unit}", "") if amount.value is None else (f"{amount.value:.4g} {unit}", band)


def _factors(footprint: "Footprint") -> "Iterator[str]":
    for name, factor in footprint.factors.items():
        if factor.amount.value is None:
            value = f"{_band(factor.amount)} {factor.unit}"
        else:
            band = _band(factor.amount)
            value = f"{factor.amount.value:.4g} {factor.unit}" + (f" ({band})" if band else "")
        told = (factor.name, factor.kind, factor.year, factor.source)
        source = factor.source if factor.name == "stated" else ", ".join(filter(None, told))
        yield f"  {_words(name)}: {value}, {source}"


def _band(amount: "Interval") -> str:
    return "" if amount.low == amount.high else f"{amount.low:.4g} to {amount.high:.4g}"
