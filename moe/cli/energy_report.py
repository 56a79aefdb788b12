"""`moe energy report`: what a run cost, how well that is known, and with which factors."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe.cli.footprint_options import footprint_options
from moe.cli.footprint_page import joules, print_footprint, row
from moe.cli.ledgers import ledgers_of

if TYPE_CHECKING:
    from moe.energy import Fold
    from moe.energy.footprint import Footprint, Stated

__all__ = ["report"]


@footprint_options()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a ledger file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    *,
    said: "Stated",
) -> None:
    """Say what a run cost: energy with its band, device-hours, phases; carbon, water and money from factors you give.

    Computed from the ledger, as often as you like. docs/footprint.md has the formulas and every shipped factor.
    """
    from moe.energy import fold_ledgers
    from moe.energy.footprint import footprint_of

    fold = fold_ledgers(ledgers_of(run))
    footprint = footprint_of(fold, said)
    if as_json:
        print(json.dumps(fold.to_json(footprint.to_json()), indent=2, allow_nan=False))
        for note in [*fold.notes, *footprint.notes]:
            print(note, file=sys.stderr)
        return
    _print_report(fold, footprint)


def _print_report(fold: "Fold", footprint: "Footprint") -> None:
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
    useful = "not told" if total.useful_device_hours is None else f"{total.useful_device_hours:.6g}"
    console.print(f"device-hours {total.device_hours:.6g}, of them useful {useful}")
    console.print(f"segments {len(fold.segments)}, unattributed {joules(total.unattributed_j)}")
    print_footprint(console, footprint)
    for line in row("", *fold.notes, *footprint.notes):
        console.print(line)
