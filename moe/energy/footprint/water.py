"""Water: what the site uses to cool, and what the power plants use. Consumed (evaporated) or withdrawn, never both.

    site = E_IT x WUE            WUE: litre a kWh of IT energy (ISO/IEC 30134-9); never times PUE
    grid = E_IT x PUE x WUE_grid

No scarcity factor is applied: none ships.
"""

from moe.energy.footprint.factors import Factor, factor_of, number, stated, table
from moe.energy.footprint.quantity import Quantity
from moe.errors import ConfigError

__all__ = ["FLOWS", "grid_water_of", "site_water_of", "water_of"]

FLOWS = ("consumed", "withdrawn")


def site_water_of(words: tuple[str, ...]) -> dict[str, Factor]:
    """WUE by flow for `--wue`: `0.3` (consumed), `withdrawn=0.5`, or the name of a row of the shipped table."""
    factors = {}
    for word in words:
        flow, equals, amount = word.rpartition("=")
        value = number(amount)
        if value is None or (equals and flow not in FLOWS):
            hint = "give litre a kWh of IT energy, consumed, or withdrawn=X"
            factor = factor_of("--wue", "wue", word, hint=hint)
        else:
            factor = stated("--wue", value, "L/kWh IT", flow or "consumed")
        if factor.kind in factors:
            raise ConfigError(f"--wue {word} is a second number of water {factor.kind} at the site: give one of them")
        factors[factor.kind] = factor
    return factors


def grid_water_of(intensity: Factor) -> dict[str, Factor]:
    """Water of the grid by flow, where the table has the zone the intensity is of."""
    rows = table("grid_water")
    return {row.kind: row for row in rows if intensity.code and row.code == intensity.code}


def water_of(it: Quantity, facility: Quantity, site: dict[str, Factor], grid: dict[str, Factor]) -> dict[str, Quantity]:
    """Litres by name: `water_consumed_site`, `water_consumed_grid`, their sum where both are known, likewise withdrawn.

    `it` and `facility` are kWh, the second with PUE.
    """
    numbers: dict[str, Quantity] = {}
    for flow in FLOWS:
        parts = {}
        if flow in site:
            factor, method = site[flow], f"IT energy x WUE ({flow} at the site)"
            parts["site"] = it.times(factor.amount, unit="L", source=factor.source, method=method)
        if flow in grid:
            factor, method = grid[flow], f"{facility.method} x grid water ({flow} by power plants)"
            parts["grid"] = facility.times(factor.amount, unit="L", source=factor.source, method=method)
        numbers |= {f"water_{flow}_{place}": part for place, part in parts.items()}
        if len(parts) == 2:
            numbers[f"water_{flow}"] = Quantity(
                amount=parts["site"].amount + parts["grid"].amount,
                unit="L",
                source=f"{facility.source}; {site[flow].source}; {grid[flow].source}",
                scope=facility.scope,
                method=f"{parts['site'].method} + {parts['grid'].method}",
                energy=it.energy,
            )
    return numbers
