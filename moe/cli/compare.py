"""`moe compare`: what runs and their baselines paid to reach the same loss."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = ["app"]


class _LadderCommand(TyperCommand):
    """Takes several words after one `--baseline`: `RUN... --baseline RUN...`, up to the next option or `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        ladder = False
        for index, word in enumerate(args):
            if word == "--":
                words += args[index:]
                break
            if word.startswith("-"):
                ladder = word == "--baseline"
            elif ladder and words[-1] != "--baseline":
                words.append("--baseline")
            words.append(word)
        return super().parse_args(ctx, words)


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=_LadderCommand)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories to compare.")],
    baseline: Annotated[
        list[Path] | None,
        typer.Option("--baseline", metavar="RUN...", help="Baselines' run directories; several form a ladder."),
    ] = None,
    at_loss: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Loss to reach, in the unit of the table; by default the lowest that every run reached.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON and nothing else.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page.")] = None,
) -> None:
    """Compare runs with their baselines at equal loss.

    A ratio is the baseline's cost over the run's: above 1, the run was the cheaper one.
    """
    from moe.compare import compare as compare_runs

    comparison = compare_runs(runs, baseline or [], at_loss)
    if html is not None:
        comparison.write_html(html)
    if as_json:
        print(json.dumps(comparison.to_json(), indent=2, allow_nan=False))
        return

    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(comparison.table())
    for note in comparison.notes:
        console.print(Text(note))
    if html is not None:
        console.print(Text(f"Written: {html}"))
