"""What making the hardware emitted, and what it will leave behind: the run's share of both.

    share    = hours reserved / (lifetime x utilisation)
    embodied = TE x share          TE: kgCO2e of one device; e-waste likewise with its mass

Hardware that works half of its life makes each working hour bear twice as much, so nothing is said without a
utilisation. A share of the baseboard and a share of the whole server differ by several times: both are given. Devices
reserved but idle count: the hours are device-hours.
"""

from moe.energy.footprint.factors import Factor, matching, stated, table
from moe.energy.footprint.quantity import Interval, Quantity
from moe.errors import ConfigError

__all__ = ["hardware_numbers", "life_of"]

HOURS_PER_YEAR = 8760
# number -> (kind of the hardware table, unit, factor from the table's kilograms)
_NUMBERS = {
    "embodied_accelerator": ("embodied_accelerator", "gCO2e", 1000.0),
    "embodied_server": ("embodied_server", "gCO2e", 1000.0),
    "e_waste": ("mass", "g", 1000.0),
}


def life_of(lifetime: float | None, utilisation: float | None) -> tuple[Factor, Factor] | None:
    """Lifetime (years; the table's range when not stated) and utilisation; None when no utilisation is stated."""
    if utilisation is None:
        if lifetime is not None:
            raise ConfigError("--lifetime needs --utilisation: the share of its life the hardware works, such as 0.6")
        return None
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation:g} must be above 0 and at most 1: give a share, such as 0.6")
    if lifetime is None:
        years = next(row for row in table("hardware") if row.kind == "lifetime")
    elif lifetime > 0:
        years = stated("--lifetime", lifetime, "years", "lifetime")
    else:
        raise ConfigError(f"--lifetime {lifetime:g} must be above 0 years: correct it or leave it out")
    return years, stated("--utilisation", utilisation, "share of lifetime")


def hardware_numbers(
    hours: dict[str, float], years: Factor, utilisation: Factor
) -> tuple[dict[str, Quantity], dict[str, Factor]]:
    """The run's share of each of _NUMBERS whose factor is known for every GPU, and the factors used."""
    numbers, factors = {}, {}
    life_h = years.amount.scaled(HOURS_PER_YEAR) * utilisation.amount
    for name, (kind, unit, scale) in _NUMBERS.items():
        found = {device: matching(kind, device) for device in hours}
        rows = {device: row for device, row in found.items() if row is not None}
        if not rows or len(rows) < len(hours):
            continue
        amount = Interval.exactly(0.0)
        for device, row in rows.items():
            amount += (row.amount.scaled(hours[device] * scale)) / life_h
            factors[f"{kind}: {device}"] = row
        numbers[name] = Quantity(
            amount=amount,
            unit=unit,
            source="; ".join(row.source for row in dict.fromkeys(rows.values())),
            scope="reserved devices" if kind == "embodied_accelerator" else "reserved devices and their servers",
            method=f"{kind.replace('_', ' ')} x device-hours / (lifetime x utilisation)",
        )
    return numbers, factors
