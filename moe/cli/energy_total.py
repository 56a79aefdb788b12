"""`moe energy total`: what a whole programme of runs cost, nothing twice."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe.cli.footprint_options import footprint_options
from moe.cli.footprint_page import joules, print_footprint, row
from moe.errors import CompareError, ConfigError

if TYPE_CHECKING:
    from moe.energy.footprint import Footprint, Stated
    from moe.energy.programme import RunLedgers
    from moe.energy.spending import Half, Programme

__all__ = ["total"]

_LEDGER = re.compile(r"ledger(\.node\d+)?\.jsonl")


@footprint_options()
def total(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Run directories, folders of them, or ledger files.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the totals as JSON and nothing else.")] = False,
    *,
    said: "Stated",
) -> None:
    """Say what a programme of runs cost: sweeps, failures, restarts, branches, metered commands; nothing twice.

    By purpose and by day (UTC). What was measured and what is an estimate are two totals, never added. A ledger that
    cannot be read is named, the others are summed, and the exit code is 2.
    """
    from moe.energy.footprint import footprint_of
    from moe.energy.programme import fold_programme

    found, given_twice = find_runs(paths)
    programme = fold_programme(found)
    programme.recognised[:0] = given_twice
    halves = {name: half for name, half in programme.halves.items() if half.basis.device_hours}
    footprints = {name: footprint_of(half.basis, said) for name, half in halves.items()}
    if as_json:
        printed = programme.to_json()
        for name in programme.halves:
            printed[name]["footprint"] = footprints[name].to_json() if name in footprints else {}
        print(json.dumps(printed, indent=2, allow_nan=False))
    else:
        _print(programme, halves, footprints)
    for sentence in programme.unreadable:
        print(f"moe: {sentence} (it is in no total)", file=sys.stderr)
    if programme.unreadable:
        raise typer.Exit(2)


def find_runs(paths: Sequence[Path]) -> tuple[list["RunLedgers"], list[str]]:
    """The runs below the paths, each ledger once, and sentences on those that several paths lead to.

    Raises ConfigError for a path that leads to no ledger.
    """
    from moe.energy.programme import RunLedgers

    known: dict[Path, str] = {}
    runs, twice = [], []
    for path in paths:
        found = list(_ledgers_below(path))
        if not found:
            raise ConfigError(f"{path} is no ledger and holds none: give run directories, or folders of them")
        for name, ledgers in found:
            fresh = tuple(ledger for ledger in ledgers if ledger.resolve() not in known)
            if not fresh:
                twice.append(f"{name} is given again, first as {known[ledgers[0].resolve()]}: counted once")
                continue
            known.update((ledger.resolve(), name) for ledger in fresh)
            runs.append(RunLedgers(name, fresh, _trunk_of(fresh[0].parent)))
    return runs, twice


def _ledgers_below(path: Path) -> Iterator[tuple[str, list[Path]]]:
    """(name, ledgers) of each run at or below a path: the ledgers of one folder are one run's."""
    from moe.rundir import RunDir

    if path.is_file():
        yield str(path), [path]
    folders = {found.parent for found in path.rglob("ledger*.jsonl") if _LEDGER.fullmatch(found.name)}
    for folder in sorted(folders):
        yield str(folder), RunDir(folder).ledgers()


def _trunk_of(folder: Path) -> str | None:
    """The run that the one in `folder` was branched from; None for one that was not."""
    from moe.rundir import RunDir

    run = RunDir(folder)
    try:
        return str(run.read_json(run.branch)["trunk"]) if run.branch.is_file() else None
    except (CompareError, KeyError, TypeError):
        return None  # the name is only for words: what is shared is told by the ledgers themselves


def _print(programme: "Programme", halves: dict[str, "Half"], footprints: dict[str, "Footprint"]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("", "energy", "±", "device-hours", "source", "scope", "coverage")
    for name, half in halves.items():
        basis = half.basis
        known = (joules(basis.band_j), f"{basis.device_hours:.6g}", basis.source, basis.scope, f"{basis.coverage:.1%}")
        table.add_row(*row(name, joules(_joules(basis.energy_mj)), *known))
    console.print(table)
    for title, key in (("purpose", "by_purpose"), ("day (UTC)", "by_day")):
        names = sorted({name for half in halves.values() for name in getattr(half, key)})
        parts = Table(title, *(f"{kind}: {what}" for kind in halves for what in ("energy", "device-hours")))
        for name in names:
            cells = []
            for half in halves.values():
                spent = getattr(half, key).get(name)
                cells += [joules(spent.energy_mj / 1000), f"{spent.device_ns / 3.6e12:.6g}"] if spent else ["", ""]
            parts.add_row(*row(name.replace("_", " "), *cells))
        console.print(parts)
    listing = Table("run", "ended", *(f"{kind}: {what}" for kind in halves for what in ("energy", "device-hours")))
    for run in programme.runs:
        cells = []
        for kind in halves:
            spent = run.measured if kind == "measured" else run.estimated
            cells += [joules(spent.energy_mj / 1000), f"{spent.device_ns / 3.6e12:.6g}"]
        listing.add_row(*row(run.name, run.ended, *cells))
    console.print(listing)
    for name, footprint in footprints.items():
        console.print(f"\n{name}")
        print_footprint(console, footprint)
        for line in row(*footprint.notes):
            console.print(line)
    if len(halves) > 1:
        console.print("\nthe two totals are never added: the estimated one is time x declared power")
    for line in row("", *programme.recognised):
        console.print(line)


def _joules(energy_mj: int | None) -> float | None:
    return None if energy_mj is None else energy_mj / 1000
