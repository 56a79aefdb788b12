"""`moe energy run` meters any program; `moe energy report` says what a run cost, and how well that is known."""

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe.cli.doctor import doctor
from moe.cli.energy_card import card
from moe.cli.energy_node import node
from moe.cli.energy_prometheus import prometheus
from moe.cli.energy_report import report
from moe.cli.energy_total import total
from moe.cli.footprint_page import joules

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


class Purpose(StrEnum):
    """What a metered program is for."""

    TRAINING = "training"
    DATA = "data"
    EVALUATION = "evaluation"
    OTHER = "other"


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
    purpose: Annotated[
        Purpose | None,
        typer.Option(
            help="What `moe energy total` counts it as; by default data for `moe data prepare`, else other.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a program with the meter on; its exit code comes back, its signals go through.

    The ledger is written to energy-runs/TIME-PID unless --out says otherwise. The program finds its path in MOE_LEDGER.
    """
    from moe.energy.supervise import purpose_of, run_metered, sources_for

    folder = out or Path("energy-runs") / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
    ledger = folder / "ledger.jsonl"
    code = run_metered(command, ledger, sources_for(devices, power), purpose or purpose_of(command))
    _print_summary(ledger)
    raise typer.Exit(code)


app.command()(report)
app.command()(node)
app.command()(doctor)
app.command()(total)
app.command()(card)
app.command()(prometheus)


def _print_summary(ledger: Path) -> None:
    from rich.console import Console

    from moe.energy import fold_ledgers

    fold = fold_ledgers([ledger])
    total = fold.total
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    known = f"± {joules(total.band_j)}, source {total.source}, scope {total.scope}, coverage {total.coverage:.1%}"
    console.print(f"energy {joules(total.energy_j)} {known}", markup=False)
    console.print(f"device-hours {total.device_hours:.6g}; ledger {ledger}", markup=False)
    for note in fold.notes:
        console.print(note, markup=False)
