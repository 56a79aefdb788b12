"""`moe energy node` holds what a run's devices used against the energy of the nodes they are in."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe.cli.ledgers import ledgers_of
from moe.cli.printable import printable

__all__ = ["node"]


def node(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a ledger file.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Node readings: CSV (utc, watts or joules), ipmitool, Redfish JSON, sacct, pm_counters. "
            "Without any, those the meter kept.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Compare a run's devices with the nodes they are in, over the time both are known for; the two are never added."""
    from moe.energy import fold_ledgers
    from moe.energy.node import node_readings, read_node_file, reconcile

    fold = fold_ledgers(ledgers_of(run))
    series = [one for file in files for one in read_node_file(file)] if files else node_readings(fold)
    result = reconcile(fold, series)
    if as_json:
        print(json.dumps(result.to_json(), indent=2, allow_nan=False))
        return
    share = "" if result.unseen_share is None else f" ({result.unseen_share:.1%} of the node)"
    print(printable(f"{result.source}, {result.elapsed_s:,.0f} s metered, node known for {result.coverage:.1%}"))
    print(f"node     {result.node_j:>16,.1f} J, its devices inside")
    print(f"devices  {result.device_j:>16,.1f} J")
    print(f"unseen   {result.unseen_j:>16,.1f} J{share}")
    for note in result.notes:
        print(note)
