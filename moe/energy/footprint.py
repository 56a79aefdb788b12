"""From joules to facility energy, carbon and money, with factors the user states. No factor is ever filled in.

    facility_kwh  = energy x PUE                    (PUE: facility energy / IT energy)
    carbon_g      = energy x PUE x grid intensity   (without a PUE: of the metered energy alone; `scope` tells)
    cost_energy   = energy x PUE x price per kWh
    cost_devices  = device-hours x price per device-hour

The two costs are two ways to pay for the same run: they are never added up.
"""

import math

from moe.errors import ConfigError

__all__ = ["footprint"]


def footprint(
    energy_j: float | None,
    device_hours: float,
    scope: str,
    pue: float | None = None,
    intensity_g_per_kwh: float | None = None,
    price_per_kwh: float | None = None,
    price_per_device_hour: float | None = None,
) -> dict[str, float | str]:
    """What can be said with the given factors, each factor beside its result; {} when none is given.

    Unknown energy (None) leaves out all that depends on it. Raises ConfigError for a factor that cannot be.
    """
    _check("pue", pue, at_least=1.0)
    _check("intensity_g_per_kwh", intensity_g_per_kwh)
    _check("price_per_kwh", price_per_kwh)
    _check("price_per_device_hour", price_per_device_hour)
    result: dict[str, float | str] = {}
    if energy_j is not None and (pue, intensity_g_per_kwh, price_per_kwh) != (None, None, None):
        energy_kwh = energy_j / 3.6e6 * (1.0 if pue is None else pue)
        result |= {"scope": scope if pue is None else "facility", "energy_scope": scope}
        if pue is not None:
            result |= {"pue": pue, "facility_kwh": energy_kwh}
        if intensity_g_per_kwh is not None:
            result |= {"intensity_g_per_kwh": intensity_g_per_kwh, "carbon_g": energy_kwh * intensity_g_per_kwh}
        if price_per_kwh is not None:
            result |= {"price_per_kwh": price_per_kwh, "cost_energy": energy_kwh * price_per_kwh}
    if price_per_device_hour is not None:
        cost = device_hours * price_per_device_hour
        result |= {"price_per_device_hour": price_per_device_hour, "cost_devices": cost}
    return result


def _check(name: str, value: float | None, at_least: float = 0.0) -> None:
    if value is not None and not at_least <= value < math.inf:
        raise ConfigError(f"{name}={value} must be a number of at least {at_least:g}: correct it or leave it out")
