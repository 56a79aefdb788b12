"""`moe energy prometheus`: what runs cost so far, as text that Prometheus reads."""

from pathlib import Path
from typing import Annotated

import typer

from moe.cli.ledgers import ledgers_of

__all__ = ["prometheus"]


def prometheus(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or ledger files.")],
) -> None:
    """Print what runs cost so far in Prometheus' text format, living runs too.

    For node_exporter's textfile collector: moe energy prometheus runs/mine > moe.prom.new && mv moe.prom.new moe.prom
    """
    from moe.energy import fold_ledgers
    from moe.energy.prometheus import exposition

    print(exposition({str(run): fold_ledgers(ledgers_of(run)) for run in runs}), end="")
