"""What a meter reads: devices, and sources that turn a sensor into integer millijoules."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

__all__ = ["COUNTERS", "ESTIMATES", "Conditioned", "Device", "Scope", "Source", "is_measured"]

# a source under one of these names never saw a sensor: its joules are time times a stated power
ESTIMATES = ("declared", "estimate:tdp")

# counters that some hardware keeps, whoever reads them: what they counted while nobody did is not lost
COUNTERS = ("counter", "node:pm_counters")

Scope = Literal["gpu", "module", "node"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One thing whose energy is counted, and how far its number can be trusted.

    uuid     the key everywhere: `GPU-…` of NVML, `AMD-…`, `CPU-<host>` for a host without accelerators
    source   counter | integrated | rapl | node:pm_counters | estimate:tdp | declared
    scope    what the joules cover: the accelerator alone (gpu), a Grace Hopper module with its processor and memory
             (module), or the host (node)
    band     declared sensor gain error, as a fraction of the energy
    tick_s   how often the sensor's number changes; the quantisation of a window is at most two ticks of `p_max_w`. Of
             integrated power: what one read is a mean over, or how far two reads lie apart
    seen     share of the time that an integrated sensor sees at one read a second; the rest is told from the spread
    p_max_w  the power the device cannot exceed; None where the sensor does not tell
    note     what a reader of the number must know, for instance that a whole GPU is billed for one MIG slice
    """

    uuid: str
    name: str
    kind: Literal["gpu", "cpu"]
    source: str
    scope: Scope
    band: float
    tick_s: float
    seen: float = 1.0
    p_max_w: float | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The device as the ledger's `segment` line stores it."""
        return asdict(self)


class Source(Protocol):
    """Reads devices. `read` never raises: a sensor that fails gives None, and `failures` says why."""

    devices: tuple[Device, ...]
    failures: dict[str, str]

    def read(self) -> dict[str, int | None]:
        """Millijoules by device uuid, counted from an arbitrary origin; None where the read failed."""

    def close(self) -> None:
        """Release the sensor."""


@runtime_checkable
class Conditioned(Protocol):
    """A source that also knows what its devices work under: temperature, clock, limit, what holds the clock down."""

    def conditions(self) -> dict[str, dict[str, Any]]:
        """By device uuid the fields of `moe.energy.conditions` it can tell. Never raises; asked about once a minute."""


def is_measured(source: str) -> bool:
    """Whether joules of this source come from a sensor."""
    return source not in ESTIMATES
