"""The `moe` command: one file per subcommand, imported only when that subcommand runs.

A MoEError ends the command with its one sentence on stderr and exit code 2, without a traceback.
"""

import sys
from importlib import import_module

import typer
from typer.core import TyperGroup

from moe.cli.printable import printable
from moe.errors import MoEError

__all__ = ["main"]

# subcommand -> the line `moe --help` prints for it (so that help imports no subcommand)
_COMMANDS = {
    "branch": "Make a run that shares a trunk's first steps and then decays.",
    "compare": "Compare runs with their baselines at equal loss: table, JSON, HTML.",
    "data": "Tokenise text once, ahead of training.",
    "energy": "Meter any program; report what a run cost, or a whole programme of runs.",
    "generate": "Continue a prompt with a trained run.",
    "recipe": "List the recipes that come with the package; copy one.",
    "runs": "List runs, show one, watch one; send one to a tracker again.",
}


class _LazyGroup(TyperGroup):
    """Lists subcommands by name and imports `moe.cli.NAME` (its `app`) when one is called."""

    def list_commands(self, ctx: object) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: object, name: str) -> object | None:  # type: ignore[override]
        if name not in _COMMANDS:
            return None
        command = typer.main.get_command(import_module(f"moe.cli.{name}").app)
        command.name = name
        return command

    def format_commands(self, ctx: object, formatter: object) -> None:
        with formatter.section("Commands"):  # type: ignore[attr-defined]
            formatter.write_dl(sorted(_COMMANDS.items()))  # type: ignore[attr-defined]


_app = typer.Typer(
    cls=_LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@_app.callback()
def _root() -> None:
    """Mixture-of-experts training with the energy meter running."""


def main() -> None:
    """Entry point of the `moe` console script."""
    try:
        _app()
    except MoEError as error:
        print(printable(f"moe: {error}"), file=sys.stderr)
        raise SystemExit(2) from None
