"""The records the meter and the fold return: the run, its devices, phases and segments, in joules and seconds."""

from dataclasses import dataclass
from typing import Any, TypedDict

__all__ = ["DeviceTotal", "LedgerPosition", "PhaseTotal", "SegmentSummary", "StepEnergy", "Total", "Totals"]


@dataclass(frozen=True, kw_only=True)
class Total:
    """The run. `energy_j` is None when nothing was read; `source` and `scope` join several names with "+"."""

    energy_j: float | None
    energy_mj: int
    device_hours: float
    useful_device_hours: float | None
    useful_energy_j: float | None
    band_j: float
    coverage: float
    unattributed_j: float
    scope: str
    source: str
    measured: bool
    energy_by_source_j: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DeviceTotal:
    """One device; one that changed its source between segments has an entry for each. `unattributed` is not in it.

    `conditions`: what `moe.energy.conditions.summarize` makes of temperature, clock, power, limit and throttling, and
    `power_over_counter` (ratio, error, num_pairs) where both were read; {} when nothing was told.
    """

    uuid: str
    name: str
    source: str
    scope: str
    energy_j: float
    band_j: float
    coverage: float
    note: str | None
    conditions: dict[str, Any]


@dataclass(frozen=True)
class PhaseTotal:
    """One phase: energy of all devices, time of the process (not times devices)."""

    energy_mj: int
    elapsed_s: float

    @property
    def energy_j(self) -> float:
        return self.energy_mj / 1000


@dataclass(frozen=True, kw_only=True)
class StepEnergy:
    """The mean step of the final lineage. No step is measured by itself: readings are a second apart, ticks 100 ms."""

    energy_j: float
    num_steps: int
    method: str = "apportioned: the energy between two readings, shared out by time"


@dataclass(frozen=True, kw_only=True)
class SegmentSummary:
    """One process's part. `ended` is "end" or "lost"; `unattributed_j` was lost just before this segment."""

    ledger: str
    segment: int
    start_utc: str
    host: str
    pid: int
    devices: list[str]
    first_step: int
    last_step: int | None
    elapsed_s: float
    energy_j: float
    unattributed_j: float
    ended: str
    end_reason: str | None
    metered_by: str | None
    second_reader: list[str]


class LedgerPosition(TypedDict):
    """Where a ledger stood; stored in checkpoints."""

    segment: int
    seq: int


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What the run cost so far, earlier segments included. `energy_j` is None when nothing could be read yet."""

    energy_j: float | None
    device_hours: float
    power_w: float | None
    source: str
    scope: str
    measured: bool

    @property
    def total_kwh(self) -> float | None:
        return None if self.energy_j is None else self.energy_j / 3.6e6
