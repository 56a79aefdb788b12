"""The section `energy`: how the run is metered, and what it costs."""

from dataclasses import dataclass
from typing import ClassVar

from moe.config.fields import Section, setting

__all__ = ["EnergyConfig"]


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(Section):
    """The meter and its prices."""

    section_name: ClassVar[str] = "energy"

    declared_power_w: float | None = setting(
        None, above=0, doc="watts to assume for a machine without sensors; none for the stated default", may_change=True
    )
    price_per_device_hour: float | None = setting(
        None, at_least=0, doc="what an hour of one device costs, in a currency of your own", may_change=True
    )
    price_per_kwh: float | None = setting(
        None,
        at_least=0,
        doc="what a kilowatt-hour costs, in the same currency; train.max_cost takes both prices together",
        may_change=True,
    )
    interval_s: float = setting(
        1.0,
        at_least=0.1,
        at_most=5,  # the flush interval of the meter
        doc="seconds between sensor readings; from 1 on longer where reading is dear",
        may_change=True,
    )

    @property
    def has_no_price(self) -> bool:
        """Whether nothing that is used costs anything."""
        return not self.price_per_device_hour and not self.price_per_kwh

    def cost(self, device_hours: float, kwh: float) -> float:
        """What so much use costs at the section's prices."""
        return device_hours * (self.price_per_device_hour or 0.0) + kwh * (self.price_per_kwh or 0.0)
