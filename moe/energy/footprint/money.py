"""Money: by the device-hour or by the kWh. Two ways to pay for one run: they are never added.

cost_devices = device-hours x price of one
cost_energy  = energy x PUE x price of a kWh      the price fixed, or a series joined by time
"""

from pathlib import Path

from moe.energy.footprint.factors import Factor, number, stated
from moe.energy.footprint.formats import read_prices
from moe.energy.footprint.profile import EnergyProfile
from moe.energy.footprint.quantity import Interval, Quantity
from moe.errors import ConfigError

__all__ = ["cost_of_devices", "cost_of_energy", "price_of"]


def price_of(word: str, profile: EnergyProfile, energy_mj: int) -> Factor:
    """The price of a kWh for `--price-kwh`: a number, or a CSV of utc,price_per_kwh."""
    value = number(word)
    if value is not None:
        return stated("--price-kwh", value, "currency/kWh", "price")
    if not Path(word).is_file():
        raise ConfigError(f"--price-kwh {word} is neither a number nor a file: give one of them")
    return read_prices(Path(word)).over(profile, energy_mj)


def cost_of_energy(energy: Quantity, price: Factor) -> Quantity:
    """What `energy` (kWh) costs."""
    method = f"{energy.method} x price of a kWh"
    return energy.times(price.amount, unit="currency", source=price.source, method=method)


def cost_of_devices(device_hours: float, price: Factor) -> Quantity:
    """What the devices cost for as long as they were held."""
    return Quantity(
        amount=Interval.exactly(device_hours) * price.amount,
        unit="currency",
        source=price.source,
        scope="reserved devices",
        method="device-hours x price of a device-hour",
    )
