"""The footprint of a run: computed from its folded ledger and what the user states, any number of times.

footprint = footprint_of(fold_ledgers([path]), Stated(pue="1.2", grid="DE"))
footprint.numbers["carbon_location"].amount      Interval(value, low, high) in gCO2e
"""

from dataclasses import dataclass, field
from typing import Any

from moe.energy.fold import Fold
from moe.energy.footprint.basis import Basis
from moe.energy.footprint.carbon import carbon_of, intensity_of
from moe.energy.footprint.embodied import hardware_numbers, life_of
from moe.energy.footprint.everyday import everyday_numbers
from moe.energy.footprint.factors import Factor, factor_of, number, stated
from moe.energy.footprint.money import cost_of_devices, cost_of_energy, price_of
from moe.energy.footprint.quantity import Interval, Quantity
from moe.energy.footprint.sci import sci_of
from moe.energy.footprint.water import grid_water_of, site_water_of, water_of
from moe.errors import ConfigError

__all__ = ["Footprint", "Stated", "footprint_of"]


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What the user states, as the options of `moe energy report`.

    pue            number, or the name of a provider in the shipped table
    cooling        air, liquid or immersion: the PUE range of that cooling; not with `pue`
    grid           zone, number in g/kWh, or series file
    market         g/kWh of the contract
    wue            litre a kWh of IT energy, consumed; `withdrawn=X`; or the name of a provider
    price          of a device-hour
    price_kwh      of a kWh: number or series file
    lifetime       years
    utilisation    share of its life the hardware works
    plain          plain equivalents too
    """

    pue: str | None = None
    cooling: str | None = None
    grid: str | None = None
    market: float | None = None
    wue: tuple[str, ...] = ()
    price: float | None = None
    price_kwh: str | None = None
    lifetime: float | None = None
    utilisation: float | None = None
    plain: bool = False


@dataclass
class Footprint:
    """Numbers and the factors they were made with, by name; `notes` are sentences a reader should see."""

    numbers: dict[str, Quantity] = field(default_factory=dict)
    factors: dict[str, Factor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def use(self, name: str, factor: Factor) -> Factor:
        """Remember a factor and what must be said of it."""
        self.factors[name] = factor
        self.notes += factor.notes
        return factor

    def to_json(self) -> dict[str, Any]:
        """`footprint` of `moe energy report --json`."""
        return {
            "numbers": {name: quantity.to_json() for name, quantity in self.numbers.items()},
            "factors": {name: factor.to_json() for name, factor in self.factors.items()},
            "notes": self.notes,
        }


def footprint_of(spent: Fold | Basis, stated_by_user: Stated) -> Footprint:
    """Everything that can be said of a run, or of what else a basis was made of.

    Energy that was never read leaves out all that depends on it.
    Raises ConfigError for a factor that cannot be, a zone that no row has, a series that does not fit.
    """
    said, result = stated_by_user, Footprint()
    basis = spent if isinstance(spent, Basis) else Basis.of_run(spent)
    pue = _pue_of(said)
    site_water = site_water_of(said.wue)
    life = life_of(said.lifetime, said.utilisation)
    if basis.energy_mj is None:
        result.notes.append("no energy was read: its carbon, water and price are not known")
    else:
        _operation(result, basis, said, pue, site_water)
    if said.price is not None:
        price = result.use("price", stated("--price", said.price, "currency/device-hour", "price"))
        result.numbers["cost_devices"] = cost_of_devices(basis.device_hours, price)
    if life is not None:
        _hardware(result, basis, *life)
    return result


def _operation(
    result: Footprint, basis: Basis, said: Stated, pue: Factor | None, site_water: dict[str, Factor]
) -> None:
    """What the run's energy entails: carbon, water, the electricity bill."""
    numbers, profile, energy_mj = result.numbers, basis.profile, basis.energy_mj or 0
    it = facility = numbers["energy_it"] = _energy_of(basis)
    if pue is not None:
        result.use("pue", pue)
        facility = numbers["energy_facility"] = it.times(
            pue.amount, unit="kWh", source=pue.source, scope=f"facility of {it.scope}", method="IT energy x PUE"
        )
    intensity = result.use("grid_carbon", intensity_of(said.grid, profile, energy_mj))
    if said.grid is None:
        result.notes.append("the location is not stated (--grid): carbon is a range over the shipped countries")
    numbers["carbon_location"] = carbon_of(facility, intensity, "location-based")
    if said.market is not None:
        market = result.use("market", stated("--market", said.market, "g/kWh", "contract"))
        numbers["carbon_market"] = carbon_of(facility, market, "market-based")
    grid_water = grid_water_of(intensity)
    for place, waters in (("wue", site_water), ("grid_water", grid_water)):
        for flow, factor in waters.items():
            result.use(f"{place}_{flow}", factor)
    numbers |= water_of(it, facility, site_water, grid_water)
    if said.price_kwh is not None:
        price = result.use("price_kwh", price_of(said.price_kwh, profile, energy_mj))
        numbers["cost_energy"] = cost_of_energy(facility, price)
    if said.plain:
        plain, factors = everyday_numbers(facility, numbers["carbon_location"])
        numbers |= plain
        result.factors |= factors
    if basis.coverage < 0.99:
        result.notes.append(f"the energy is known for {basis.coverage:.1%} of the time: the rest is in no number")
    if it.scope == "gpu":
        result.notes.append("the energy is that of the GPUs alone: processors, memory and network are in no number")


def _hardware(result: Footprint, basis: Basis, years: Factor, utilisation: Factor) -> None:
    """The share of making the hardware, and with it the SCI."""
    hours = basis.gpu_hours
    made, factors = hardware_numbers(hours, years, utilisation)
    result.numbers |= made
    result.factors |= {"lifetime": years, "utilisation": utilisation, **factors}
    if "embodied_server" not in made:
        if hours:
            unknown = f"no table has the embodied carbon of servers of {', '.join(hours)}"
        else:
            unknown = "hosts without a GPU are in no table of embodied carbon"
        result.notes.append(f"{unknown}: it and the SCI are left out")
    elif "carbon_location" in result.numbers:
        location = result.numbers["carbon_location"]
        tokens = basis.tokens
        if tokens and basis.first_step:
            tokens = None
            result.notes.append(f"the ledger begins at step {basis.first_step}: the SCI per token is left out")
        result.numbers |= sci_of(location, made["embodied_server"], tokens)


def _energy_of(basis: Basis) -> Quantity:
    kwh, band = (basis.energy_mj or 0) / 3.6e9, basis.band_j / 3.6e6
    return Quantity(
        amount=Interval(kwh, max(0.0, kwh - band), kwh + band),
        unit="kWh",
        source=basis.source,
        scope=basis.scope,
        method="IT energy",
        energy="measured" if basis.measured else "estimate",
    )


def _pue_of(said: Stated) -> Factor | None:
    if said.pue is None and said.cooling is None:
        return None
    if said.pue is not None and said.cooling is not None:
        raise ConfigError("--pue and --cooling both state the PUE: give one of them")
    if said.cooling is not None:
        return factor_of("--cooling", "pue", said.cooling, ("cooling",), "or give --pue")
    assert said.pue is not None
    value = number(said.pue)
    if value is not None:
        return stated("--pue", value, "ratio", "stated", at_least=1.0)
    return factor_of("--pue", "pue", said.pue, ("provider", "industry"), "give a number of at least 1")
