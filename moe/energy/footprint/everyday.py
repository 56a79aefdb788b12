"""The same in plain words, on request: days of a household's electricity, days of a car. Both are of the US."""

from moe.energy.footprint.factors import Factor, table
from moe.energy.footprint.quantity import Quantity

__all__ = ["everyday_numbers"]

_UNITS = {"household": "days of a US home's electricity", "car": "days of a US car's exhaust"}


def everyday_numbers(energy: Quantity, carbon: Quantity) -> tuple[dict[str, Quantity], dict[str, Factor]]:
    """`plain_household` of the energy and `plain_car` of the carbon, and the factors used."""
    numbers, factors = {}, {}
    for factor in table("everyday"):
        of = energy if factor.kind == "energy" else carbon
        numbers[f"plain_{factor.code}"] = Quantity(
            amount=of.amount / factor.amount,
            unit=_UNITS[factor.code],
            source=f"{of.source}; {factor.source}",
            scope=of.scope,
            method=f"({of.method}) / {factor.name}",
            energy=of.energy,
        )
        factors[factor.code] = factor
    return numbers, factors
