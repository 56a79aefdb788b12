"""A model card's block: Hugging Face's front matter, and a table in Markdown."""

import json
from collections.abc import Iterator
from decimal import Decimal

from moe.disclosure.facts import METHOD_OF_FLOP, Facts
from moe.energy.footprint.quantity import Interval, Quantity

__all__ = ["front_matter", "markdown"]


def front_matter(facts: Facts) -> str:
    """YAML `co2_eq_emissions`, between its lines of dashes: location-based grams of CO2 equivalent.

    A field that nobody stated is left out; without a place there are no emissions to give.
    """
    carbon = facts.footprint.numbers.get("carbon_location")
    lines = ["---", "co2_eq_emissions:"]
    if carbon is not None and carbon.amount.value is not None:
        lines.append(f"  emissions: {_plain(carbon.amount.value)}")
    else:
        lines.append("  # emissions: not known; say where it ran with --grid")
    source = f"frugal-moe energy ledger: {facts.how}"
    if carbon is not None and carbon.amount.value is not None:
        band = f"{_plain(carbon.amount.low)} to {_plain(carbon.amount.high)} g"
        source += f"; {carbon.method}, {carbon.scope}, {band}"
    fields = {"source": source, "training_type": None if facts.recipe is None else "pre-training"}
    fields |= {"geographical_location": facts.location, "hardware_used": facts.hardware_words}
    lines += [f"  {name}: {_quoted(value)}" for name, value in fields.items() if value]
    return "\n".join([*lines, "---"]) + "\n"


def markdown(facts: Facts) -> str:
    """The table: each number with its band, scope, and how it came about."""
    estimate = " (an estimate: time x declared power)" if facts.is_estimate else ""
    lines = ["## Environmental impact", "", "| | value | band | scope | how |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in _rows(facts, estimate)]
    notes = [*facts.fold.notes, *facts.footprint.notes]
    lines += ["", *(f"- {_cell(note)}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def _rows(facts: Facts, estimate: str) -> Iterator[tuple[str, str, str, str, str]]:
    total, (first, last) = facts.fold.total, facts.span
    yield "Hardware", facts.hardware_words, "", "", "as the meter's ledger names it"
    yield "Period (UTC)", f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}", "", "", "ledger"
    useful = "" if total.useful_device_hours is None else f", {_plain(total.useful_device_hours)} of them useful"
    hours = f"{_plain(total.device_hours)}{useful}"
    yield "Device-hours", hours, "", "reserved devices", "devices x time, idle time and lost work included"
    if facts.flop is not None:
        yield "Training compute", f"{facts.flop:.3g} FLOP", "", "", METHOD_OF_FLOP
    for name, number in facts.footprint.numbers.items():
        if name.startswith(("energy", "carbon", "water", "embodied", "e_waste", "sci")):
            mark = estimate if number.energy == "estimate" else ""
            yield _words(name) + mark, _value(number), _band(number), number.scope, f"{number.method}; {number.source}"
    pue = facts.footprint.factors.get("pue")
    if pue is not None:
        yield "PUE", _amount(pue.amount), "", "facility / IT energy", pue.source
    if facts.location:
        yield "Location", facts.location, "", "", "stated"


def _words(name: str) -> str:
    return {
        "energy_it": "Energy, IT",
        "energy_facility": "Energy, facility",
        "carbon_location": "Carbon, location-based",
        "carbon_market": "Carbon, market-based",
        "e_waste": "E-waste",
    }.get(name, name.replace("_", " ").capitalize())


def _value(number: Quantity) -> str:
    return "" if number.amount.value is None else f"{_plain(number.amount.value)} {number.unit}"


def _band(number: Quantity) -> str:
    amount = number.amount
    return "" if amount.low == amount.high else f"{_plain(amount.low)} to {_plain(amount.high)} {number.unit}"


def _amount(amount: Interval) -> str:
    return f"{_plain(amount.low)} to {_plain(amount.high)}" if amount.value is None else _plain(amount.value)


def _plain(value: float) -> str:
    """Four digits and never an exponent, which YAML and people read in different ways."""
    return f"{Decimal(f'{value:.4g}'):f}"


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar, which JSON's strings are."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _cell(text: str) -> str:
    """Text that is neither a table's border nor markup: names in a ledger may come from anywhere."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, "\\" + character)
    return _printable(text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
