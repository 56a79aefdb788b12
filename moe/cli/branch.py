"""`moe branch`: a run with a learning-rate decay of its own, out of a checkpoint of a trunk."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def branch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the trunk, a run with optim.schedule=wsd.")],
    at: Annotated[int, typer.Option(metavar="STEP", help="Step of the checkpoint to go on from.", show_default=False)],
    decay: Annotated[int, typer.Option(metavar="N", help="Steps to decay over.", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the new run; by default RUN-at-STEP.", show_default=False),
    ] = None,
) -> None:
    """Make a run that shares a trunk's first steps and then decays, and print the command that trains it.

    The trunk is not changed, and may still be training.
    """
    import shlex

    from moe.branch import branch as make_branch
    from moe.rundir import RunDir

    made = make_branch(RunDir.existing(run), at, decay, name)
    print(f"accelerate launch -m moe.trainer {shlex.quote(str(made.root))}")
