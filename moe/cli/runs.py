"""`moe runs`: how runs stand, what one holds, a living one as it goes; and a run sent to a tracker once more."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from moe.runs import Follower, RunStatus

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.callback()
def _group() -> None:
    """How runs stand, what one holds, a living one as it goes."""


@app.command("list")
def list_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the runs.")] = Path("runs"),
    as_json: _Json = False,
) -> None:
    """List the runs of a folder: state, progress, losses, cost. A ~ marks energy that is an estimate."""
    from moe.runs import list_runs

    runs = list_runs(folder)
    if as_json:
        print(json.dumps([vars(run) for run in runs], indent=2))
        return

    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(_table(runs))
    for run in runs:
        if run.problem:
            console.print(Text(_plain(run.problem)))


@app.command()
def show(
    run: _Run,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every checkpoint and compare its checksums, not its sizes only.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Show one run: what it is, how far, losses, cost, checkpoints, and the command that made it."""
    from moe.runs import read_details

    check: Callable[[Path], None] | None = None
    if verify:
        from moe.checkpoint import verify as check_sums

        check = check_sums
    details = read_details(run, check)
    if as_json:
        print(json.dumps(details.to_json(), indent=2))
        return

    from rich.console import Console

    from moe.cli.run_page import page

    Console(highlight=False).print(page(details, verified=verify))


@app.command()
def watch(
    run: _Run,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Seconds between two looks.")] = 1.0,
) -> None:
    """Follow a living run until it ends: progress, loss, tokens/s, power, time to go. Ctrl-C leaves it alone."""
    from moe.rundir import RunDir
    from moe.runs import Follower, read_status

    directory = RunDir.existing(run)
    problem = read_status(run).problem
    if problem:
        raise ConfigError(problem)
    follower = Follower(directory)
    try:
        _follow_live(follower, every) if sys.stdout.isatty() else _follow_plainly(follower, every)
    except KeyboardInterrupt:
        return
    status = read_status(run)
    print(f"{run} is {status.state} at step {status.step} of {status.max_steps}")


@app.command()
def track(
    run: _Run,
    to: Annotated[
        str, typer.Option("--to", metavar="TRACKERS", help="wandb, trackio, tensorboard, several with commas.")
    ],
) -> None:
    """Send a run's metrics to trackers once more, each step once: they can be rebuilt from metrics.jsonl."""
    from moe.config import TrackingConfig
    from moe.energy.locks import is_locked
    from moe.rundir import RunDir

    directory = RunDir.existing(run)
    names = TrackingConfig(trackers=tuple(name.strip() for name in to.split(","))).trackers
    if is_locked(directory.ledger()):
        raise ConfigError(f"{run} is being trained and writes to its trackers itself; try again when it has ended")

    from moe.tracking import rebuild

    for name in names:
        print(f"{rebuild(directory, name)} rows of {run} sent to {name}", flush=True)


def _follow_live(follower: "Follower", every: float) -> None:
    from rich.live import Live

    follower.look()
    with Live(_panel(follower), auto_refresh=False) as live:
        while follower.living:
            time.sleep(every)
            follower.look()
            live.update(_panel(follower), refresh=True)


def _follow_plainly(follower: "Follower", every: float) -> None:
    if follower.look():
        print(_line(follower), flush=True)
    while follower.living:
        time.sleep(every)
        if follower.look():
            print(_line(follower), flush=True)


def _panel(follower: "Follower") -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=follower.max_steps, completed=follower.step))
    grid.add_row(Text(_line(follower)))
    return grid


def _line(follower: "Follower") -> str:
    """What is known of a living run, in one line."""
    from moe.compare.sentences import number

    values = follower.values
    parts = [f"step {follower.step}/{follower.max_steps}"]
    for name, words in (
        ("train/loss", "loss {:.4f}"),
        ("eval/loss", "eval {:.4f}"),
        ("energy/power_w", "{:.0f} W"),
        ("energy/total_kwh", "{:.4g} kWh"),
    ):
        if name in values:
            parts.append(words.format(values[name]))
    if "efficiency/tokens_per_s" in values:
        parts.append(f"{number(values['efficiency/tokens_per_s'])} tokens/s")
    if follower.remaining_s is not None:
        parts.append(f"{_duration(follower.remaining_s)} to go")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _table(runs: "list[RunStatus]") -> "Table":
    """Two lines a run, so that it fits into eighty columns; names are never markup."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run\nstarted (UTC)", overflow="fold", min_width=16)
    table.add_column("state")
    for heading in ("step\ntokens", "train loss\neval loss", "device-\nhours", "energy\nsource"):
        table.add_column(heading, justify="right", overflow="fold")
    for run in runs:
        table.add_row(*_row(run))
    return table


def _row(run: "RunStatus") -> "list[Text]":
    from rich.text import Text

    from moe.compare.sentences import number

    energy = "" if run.energy_kwh is None else f"{'' if run.measured else '~'}{number(run.energy_kwh)} kWh"
    step = "" if run.max_steps is None else f"{run.step}/{run.max_steps}"
    losses = ["" if loss is None else f"{loss:.4f}" for loss in (run.train_loss, run.eval_loss)]
    cells = [
        (run.name, (run.started_utc or "")[:16].replace("T", " ")),
        (run.state,),
        (step, number(run.tokens) if run.tokens else ""),
        losses,
        ("" if run.device_hours is None else number(run.device_hours),),
        (energy, run.energy_source or ""),
    ]
    return [Text("\n".join(map(_plain, lines)).rstrip()) for lines in cells]


def _plain(text: str) -> str:
    """A name in a file cannot steer the terminal."""
    from moe.compare.runs import printable

    return printable(text)
