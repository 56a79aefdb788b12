"""`moe energy run` meters any program; `moe energy report` says what a run cost, and how well that is known."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe.cli.doctor import doctor
from moe.cli.energy_node import node
from moe.cli.ledgers import ledgers_of

if TYPE_CHECKING:
    from moe.energy import Fold

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(doctor)
app.command()(node)


@app.callback()
def _group() -> None:
    """Meter any program; report what a run cost."""


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The program and its arguments.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the ledger; an existing ledger gets one more segment.", show_default=False
        ),
    ] = None,
    power: Annotated[
        float | None,
        typer.Option(metavar="W", help="Watts per device, declared instead of measured.", show_default=False),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(help="GPUs as in CUDA_VISIBLE_DEVICES, or `host`; by default those visible.", show_default=False),
    ] = None,
) -> None:
    """Run a program with the meter on; its exit code comes back, its signals go through.

    The ledger is written to energy-runs/TIME-PID unless --out says otherwise. The program finds its path in MOE_LEDGER.
    """
    from moe.energy.supervise import run_metered, sources_for

    folder = out or Path("energy-runs") / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
    ledger = folder / "ledger.jsonl"
    code = run_metered(command, ledger, sources_for(devices, power))
    _print_summary(ledger)
    raise typer.Exit(code)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a ledger file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    pue: Annotated[
        float | None, typer.Option(metavar="X", help="Facility energy over IT energy.", show_default=False)
    ] = None,
    grid: Annotated[
        float | None, typer.Option(metavar="G_PER_KWH", help="Grid intensity, gCO2eq per kWh.", show_default=False)
    ] = None,
    price_kwh: Annotated[float | None, typer.Option(metavar="X", help="Price of a kWh.", show_default=False)] = None,
    price_hour: Annotated[
        float | None, typer.Option(metavar="X", help="Price of a device-hour.", show_default=False)
    ] = None,
) -> None:
    """Say what a run cost: energy with its band, device-hours, phases; carbon and money only from factors you give."""
    from moe.energy import fold_ledgers, footprint

    fold = fold_ledgers(ledgers_of(run))
    total = fold.total
    costs = footprint(total.energy_j, total.device_hours, total.scope, pue, grid, price_kwh, price_hour)
    if as_json:
        print(json.dumps(fold.to_json(costs), indent=2, allow_nan=False))
        for note in fold.notes:
            print(note, file=sys.stderr)
        return
    _print_report(fold, costs)


def _joules(energy_j: float | None) -> str:
    if energy_j is None:
        return "not known"
    return f"{energy_j:,.1f} J" if energy_j < 36_000 else f"{energy_j / 3.6e6:,.4g} kWh"


def _print_summary(ledger: Path) -> None:
    from rich.console import Console

    from moe.energy import fold_ledgers

    fold = fold_ledgers([ledger])
    total = fold.total
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    known = f"± {_joules(total.band_j)}, source {total.source}, scope {total.scope}, coverage {total.coverage:.1%}"
    console.print(f"energy {_joules(total.energy_j)} {known}", markup=False)
    console.print(f"device-hours {total.device_hours:.6g}; ledger {ledger}", markup=False)
    for note in fold.notes:
        console.print(note, markup=False)


def _print_report(fold: "Fold", costs: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def row(*words: str) -> list[Text]:
        """Cells that are neither markup nor able to steer the terminal: a ledger may come from anywhere."""
        return [Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in word)) for word in words]

    total = fold.total
    console = Console(highlight=False)
    table = Table("", "energy", "±", "source", "scope", "coverage")
    parts: list[tuple[str, Any]] = [("total", total)]
    parts += [(f"{device.name} {device.uuid}", device) for device in fold.devices]
    for name, part in parts:
        numbers = (_joules(part.energy_j), _joules(part.band_j), part.source, part.scope, f"{part.coverage:.1%}")
        table.add_row(*row(name, *numbers))
    console.print(table)
    phases = Table("phase", "energy", "time")
    for name, phase in fold.phases.items():
        phases.add_row(*row(name, _joules(phase.energy_j), f"{phase.elapsed_s:,.1f} s"))
    console.print(phases)
    useful = "not told" if total.useful_device_hours is None else f"{total.useful_device_hours:.6g}"
    lines = [f"device-hours {total.device_hours:.6g}, of them useful {useful}"]
    lines += [f"segments {len(fold.segments)}, unattributed {_joules(total.unattributed_j)}"]
    lines += [f"{name} {value if isinstance(value, str) else format(value, '.6g')}" for name, value in costs.items()]
    for line in row(*lines, *fold.notes):
        console.print(line)
