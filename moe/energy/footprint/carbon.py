"""Carbon of the electricity a run used: location-based and market-based, side by side and never mixed.

    carbon = energy x PUE x intensity

Location-based takes what the grid at that place emitted (average), or would emit for one more kWh (marginal); the
factor says which, and whether it counts the fuel's and the plant's life (lifecycle) or the stack alone (direct).
Market-based takes the contract's factor instead.
"""

from pathlib import Path

from moe.energy.footprint.factors import Factor, factor_of, number, range_over, stated, table
from moe.energy.footprint.formats import read_intensities
from moe.energy.footprint.profile import EnergyProfile
from moe.energy.footprint.quantity import Quantity

__all__ = ["carbon_of", "intensity_of"]

_HINT = "give a country, a number in g/kWh, or a series file"


def intensity_of(grid: str | None, profile: EnergyProfile, energy_mj: int) -> Factor:
    """The location-based intensity for `--grid`: a number in g/kWh, a series file, a zone, or None for nobody knows.

    Raises ConfigError for a negative number, a series that cannot be read or misses the run, an unknown zone.
    """
    if grid is None:
        countries = [row for row in table("grid_carbon") if row.kind == "average, lifecycle"]
        return range_over(countries, "location not stated")
    value = number(grid)
    if value is not None:
        return stated("--grid", value, "g/kWh", "kind not stated")
    if Path(grid).suffix in (".csv", ".json") or Path(grid).is_file():
        return read_intensities(Path(grid)).over(profile, energy_mj)
    return factor_of("--grid", "grid_carbon", grid, hint=_HINT)


def carbon_of(energy: Quantity, intensity: Factor, accounting: str) -> Quantity:
    """`energy` (kWh) times an intensity; `accounting` is "location-based" or "market-based"."""
    return energy.times(
        intensity.amount,
        unit="gCO2e",
        source=intensity.source,
        method=f"{energy.method} x grid intensity ({accounting}; {intensity.kind})",
    )
