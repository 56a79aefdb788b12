"""`moe energy card`: what a run cost, as a model card, a BoAmps report or the EU's documentation wants it."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe.cli.footprint_options import footprint_options
from moe.cli.ledgers import ledgers_of

if TYPE_CHECKING:
    from moe.energy.footprint import Stated

__all__ = ["card"]


class Form(StrEnum):
    """What to print."""

    HF = "hf"
    MARKDOWN = "markdown"
    BOAMPS = "boamps"
    GPAI = "gpai"


@footprint_options(without=("price", "price_kwh", "plain"))
def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a ledger file.")],
    form: Annotated[
        Form, typer.Option("--format", help="Model card of Hugging Face, table alone, BoAmps, EU documentation.")
    ] = Form.HF,
    location: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE", help="Where it ran, in words; by default the place --grid names.", show_default=False
        ),
    ] = None,
    *,
    said: "Stated",
) -> None:
    """Print what a run cost for publication: each number with band, scope, source and method.

    An estimate is called one. What nobody stated is left out, and stderr says what the form misses.
    """
    from moe.disclosure import boamps, facts_of, front_matter, gpai, markdown
    from moe.energy import fold_ledgers
    from moe.energy.footprint import footprint_of

    fold = fold_ledgers(ledgers_of(run))
    facts = facts_of(run, fold, footprint_of(fold, said), location)
    if form in (Form.HF, Form.MARKDOWN):
        print((front_matter(facts) + "\n" if form is Form.HF else "") + markdown(facts), end="")
        return
    answers, missing = boamps(facts) if form is Form.BOAMPS else gpai(facts)
    print(json.dumps(answers, indent=2, allow_nan=False))
    if missing:
        print(f"not known, to be completed by hand: {', '.join(missing)}", file=sys.stderr)
