"""`moe energy report`: what a run cost, how well that is known, and with which factors."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe.cli.footprint_options import footprint_options
from moe.cli.footprint_page import joules, print_footprint, row
from moe.cli.ledgers import ledgers_of

if TYPE_CHECKING:
    from moe.energy import Fold
    from moe.energy.footprint import Footprint, Stated
    from moe.energy.node import NodeReconciliation
    from moe.runs import Components

__all__ = ["report"]


@footprint_options()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a ledger file.")],
    node: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|kept",
            help="Readings of the nodes as in `moe energy node`, or those the meter kept: the footprint is then "
            "that of the nodes. Repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
    *,
    said: "Stated",
) -> None:
    """Say what a run cost: energy with its band, device-hours, phases; carbon, water and money from factors you give.

    Computed from the ledger, as often as you like. docs/footprint.md has the formulas and every shipped factor.
    """
    from moe.energy import fold_ledgers
    from moe.energy.footprint import Basis, footprint_of

    fold = fold_ledgers(ledgers_of(run))
    basis, nodes = Basis.of_run(fold), _nodes_of(fold, node) if node else None
    footprint = footprint_of(basis if nodes is None else basis.on_nodes(nodes), said)
    components, complaints = _components_of(run, fold)
    notes = [*fold.notes, *complaints, *(nodes.notes if nodes else ()), *footprint.notes]
    if as_json:
        printed = fold.to_json(footprint.to_json()) | {"components": components.to_json() if components else {}}
        print(json.dumps(printed | ({} if nodes is None else {"node": nodes.to_json()}), indent=2, allow_nan=False))
        for note in notes:
            print(note, file=sys.stderr)
        return
    _print_report(fold, components, nodes, footprint, notes)


def _components_of(run: Path, fold: "Fold") -> tuple["Components | None", list[str]]:
    """The components, and a sentence when damaged metrics hide them: the ledger is as good without."""
    from moe.errors import CompareError
    from moe.rundir import RunDir
    from moe.runs import read_components

    if not run.is_dir():
        return None, []
    try:
        return read_components(RunDir(run), fold), []
    except CompareError as error:
        return None, [f"components are left out: {error}"]


def _nodes_of(fold: "Fold", words: list[str]) -> "NodeReconciliation":
    from moe.energy.node import node_readings, read_node_file, reconcile

    given = (node_readings(fold) if word == "kept" else read_node_file(Path(word)) for word in words)
    return reconcile(fold, [series for one in given for series in one])


def _print_report(
    fold: "Fold",
    components: "Components | None",
    nodes: "NodeReconciliation | None",
    footprint: "Footprint",
    notes: Sequence[str],
) -> None:
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
    if nodes is not None:
        numbers = (joules(nodes.node_j), joules(nodes.band_j), nodes.source, "node", f"{nodes.coverage:.1%}")
        table.add_row(*row(f"nodes {', '.join(nodes.hosts)}, their devices inside", *numbers))
        table.add_row(*row("devices over that time", joules(nodes.device_j), "", "", fold.total.scope, ""))
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
    if fold.per_step is not None:
        step = fold.per_step
        console.print(f"a step {joules(step.energy_j)}, the mean of {step.num_steps:,}")
        console.print(f"phases and steps are {step.method}")
    console.print(f"segments {len(fold.segments)}, unattributed {joules(total.unattributed_j)}")
    print_footprint(console, footprint)
    for line in row("", *notes):
        console.print(line)
