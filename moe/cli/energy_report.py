"""`moe energy report`: what a run cost, how well that is known, and with which factors."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe.cli.footprint_options import (
    Cooling,
    Grid,
    Lifetime,
    Market,
    Plain,
    Price,
    PriceKwh,
    Pue,
    Utilisation,
    Wue,
)
from moe.cli.ledgers import ledgers_of
from moe.cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.text import Text

    from moe.energy import Fold
    from moe.energy.footprint import Footprint
    from moe.energy.footprint.quantity import Interval, Quantity
    from moe.runs import Components

__all__ = ["joules", "print_footprint", "report", "row"]

# what is printed in larger units from a thousand on, and a thousand of it
_LARGER = {"gCO2e": "kgCO2e", "kgCO2e": "tCO2e", "g": "kg", "kWh": "MWh", "MWh": "GWh", "L": "m3"}


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a ledger file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    pue: Pue = None,
    cooling: Cooling = None,
    grid: Grid = None,
    market: Market = None,
    wue: Wue = None,
    price: Price = None,
    price_kwh: PriceKwh = None,
    lifetime: Lifetime = None,
    utilisation: Utilisation = None,
    plain: Plain = False,
) -> None:
    """Say what a run cost: energy with its band, device-hours, phases; carbon, water and money from factors you give.

    Computed from the ledger, as often as you like. docs/footprint.md has the formulas and every shipped factor.
    """
    from moe.energy import fold_ledgers
    from moe.energy.footprint import Stated, footprint_of

    fold = fold_ledgers(ledgers_of(run))
    said = Stated(
        pue=pue,
        cooling=cooling,
        grid=grid,
        market=market,
        wue=tuple(wue or ()),
        price=price,
        price_kwh=price_kwh,
        lifetime=lifetime,
        utilisation=utilisation,
        plain=plain,
    )
    footprint = footprint_of(fold, said)
    components = _components_of(run, fold)
    if as_json:
        printed = fold.to_json(footprint.to_json()) | {"components": components.to_json() if components else {}}
        print(json.dumps(printed, indent=2, allow_nan=False))
        for note in [*fold.notes, *footprint.notes]:
            print(note, file=sys.stderr)
        return
    _print_report(fold, components, footprint)


def _components_of(run: Path, fold: "Fold") -> "Components | None":
    from moe.rundir import RunDir
    from moe.runs import read_components

    return read_components(RunDir(run), fold) if run.is_dir() else None


def joules(energy_j: float | None) -> str:
    """Joules, from 36 kJ on as kWh."""
    if energy_j is None:
        return "not known"
    return f"{energy_j:,.1f} J" if energy_j < 36_000 else f"{energy_j / 3.6e6:,.4g} kWh"


def row(*words: str) -> list["Text"]:
    """Cells that are neither markup nor able to steer the terminal: a ledger may come from anywhere."""
    from rich.text import Text

    return [Text(printable(word)) for word in words]


def _print_report(fold: "Fold", components: "Components | None", footprint: "Footprint") -> None:
    from rich.console import Console
    from rich.table import Table

    total = fold.total
    console = Console(highlight=False)
    table = Table("", "energy", "±", "source", "scope", "coverage")
    parts: list[tuple[str, Any]] = [("total", total)]
    parts += [(f"{device.name} {device.uuid}", device) for device in fold.devices]
    for name, part in parts:
        numbers = (joules(part.energy_j), joules(part.band_j), part.source, part.scope, f"{part.coverage:.1%}")
        table.add_row(*row(name, *numbers))
    console.print(table)
    phases = Table("phase", "energy", "time")
    for name, phase in fold.phases.items():
        phases.add_row(*row(name, joules(phase.energy_j), f"{phase.elapsed_s:,.1f} s"))
    console.print(phases)
    if components:
        parts_table = Table("component", "energy, apportioned by time", "a step")
        for name, energy_mj in components.energy_mj.items():
            parts_table.add_row(*row(name, joules(energy_mj / 1000), f"{components.step_s[name] * 1000:,.1f} ms"))
        console.print(parts_table)
    useful = "not told" if total.useful_device_hours is None else f"{total.useful_device_hours:.6g}"
    console.print(f"device-hours held {total.device_hours:.6g}, of them useful {useful}")
    useful = "not told" if total.useful_device_hours is None else joules(total.useful_energy_j)
    console.print(f"energy {joules(total.energy_j)}, of it useful {useful}")
    console.print(f"segments {len(fold.segments)}, unattributed {joules(total.unattributed_j)}")
    print_footprint(console, footprint)
    for line in row("", *fold.notes, *footprint.notes):
        console.print(line)


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
