"""Turns one device's raw readings into energy that only grows. The meter and the fold count with the same code."""

from moe.energy.sources.base import COUNTERS, ESTIMATES

__all__ = ["DeviceTrack"]


class DeviceTrack:
    """Accumulates one device's energy over one segment, in integer millijoules.

    `energy_mj`   sum over intervals between two valid reads; None before the first valid read
    `covered_ns`  length of those intervals
    An interval in which the counter fell (driver reloaded) is left out. One with failed reads inside counts for a
    counter, which went on by itself, and is left out for a sensor that was integrated by reading it.
    """

    def __init__(self, source: str) -> None:
        self._runs_by_itself = source in COUNTERS + ESTIMATES
        self.energy_mj: int | None = None
        self.covered_ns = 0
        self.last_ns = 0
        self.last_raw_mj: int | None = None
        self._failing = False

    def update(self, at_ns: int, raw_mj: int | None) -> str | None:
        """Take a reading in. Returns what went wrong with it, once per failure: "reset", "lost", or None."""
        if raw_mj is None:
            first_failure, self._failing = not self._failing, True
            return "lost" if first_failure else None
        event = None
        if self.energy_mj is None or self.last_raw_mj is None:
            self.energy_mj = 0
        elif raw_mj < self.last_raw_mj:
            event = "reset"
        elif not self._failing or self._runs_by_itself:
            self.energy_mj += raw_mj - self.last_raw_mj
            self.covered_ns += at_ns - self.last_ns
        self._failing = False
        self.last_ns, self.last_raw_mj = at_ns, raw_mj
        return event
