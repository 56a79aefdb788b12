"""The sections `run` and `energy`: which run this is, and how it is metered."""

from dataclasses import dataclass
from typing import ClassVar

from moe.config.fields import Section, setting

__all__ = ["EnergyConfig", "RunConfig"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Which run this is."""

    section_name: ClassVar[str] = "run"

    name: str = setting(doc="folder of the run below run.directory")
    directory: str = setting("runs", doc="folder that holds the runs", may_change=True)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1, doc="seed of the initial weights and of the data order")


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(Section):
    """The meter."""

    section_name: ClassVar[str] = "energy"

    declared_power_w: float | None = setting(
        None, above=0, doc="watts to assume for a machine without sensors; none for the stated default", may_change=True
    )
    price_per_device_hour: float | None = setting(
        None, at_least=0, doc="what an hour of one device costs, in a currency of your own", may_change=True
    )
    price_per_kwh: float | None = setting(
        None, at_least=0, doc="what a kilowatt-hour costs, in the same currency", may_change=True
    )
    interval_s: float = setting(1.0, at_least=0.1, at_most=60, doc="seconds between sensor readings", may_change=True)

    @property
    def has_no_price(self) -> bool:
        """Whether nothing that is used costs anything."""
        return not self.price_per_device_hour and not self.price_per_kwh

    def cost(self, device_hours: float, kwh: float) -> float:
        """What so much use costs at the section's prices."""
        return device_hours * (self.price_per_device_hour or 0.0) + kwh * (self.price_per_kwh or 0.0)
