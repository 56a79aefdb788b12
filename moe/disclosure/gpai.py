"""What the EU's Model Documentation Form for general-purpose AI asks of training: compute, time, hardware, energy.

The form (Code of Practice, transparency chapter; AI Act, Annex XI) is a document, not a JSON schema: the names of the
fields here are ours. It asks for the energy in MWh with at least two significant figures, and for how it was estimated.
"""

from typing import Any

from moe.disclosure.facts import METHOD_OF_FLOP, Facts
from moe.energy.footprint.quantity import Quantity

__all__ = ["gpai"]


def gpai(facts: Facts) -> tuple[dict[str, Any], list[str]]:
    """The answers, and what is missing from them."""
    total, (first, last), numbers = facts.fold.total, facts.span, facts.footprint.numbers
    answers: dict[str, Any] = {
        "form": "EU model documentation form, training compute and energy; field names are not standardised",
        "model": {"name": facts.name},
        "training": {
            "start_utc": first.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "end_utc": last.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "duration_hours": facts.held_s / 3600,
            "device_hours": {
                "value": total.device_hours,
                "useful": total.useful_device_hours,
                "method": "devices x time; start-up, idle time, evaluation and lost work included",
            },
            "hardware": [
                {"type": kind, "name": name, "count": count} for (kind, name), count in facts.hardware.items()
            ],
        },
    }
    training, missing = answers["training"], []
    if facts.parameters is not None:
        answers["model"] |= {"parameters_total": facts.parameters[0], "parameters_active": facts.parameters[1]}
    if facts.flop is not None:
        training["compute_flop"] = {"value": facts.flop, "is_estimate": True, "method": METHOD_OF_FLOP}
        training["tokens"] = facts.fold.tokens
    else:
        missing.append("training.compute_flop")
    for name, number in (("energy_mwh", "energy_it"), ("energy_facility_mwh", "energy_facility")):
        if number in numbers:
            training[name] = _megawatt_hours(numbers[number], facts)
        else:
            missing.append(f"training.{name}")
    if facts.location:
        training["location"] = facts.location
    else:
        missing.append("training.location")
    return answers, sorted(missing)


def _megawatt_hours(number: Quantity, facts: Facts) -> dict[str, Any]:
    amount = number.amount.scaled(1e-3)
    return {
        "value": amount.value,
        "low": amount.low,
        "high": amount.high,
        "is_estimate": number.energy == "estimate",
        "scope": number.scope,
        "source": number.source,
        "method": f"{number.method}; {facts.how}",
    }
