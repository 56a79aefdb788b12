"""Turns one device's raw readings into energy that only grows. The meter and the fold count with the same code."""

from moe.energy.sources.base import COUNTERS, ESTIMATES
from moe.energy.sources.integral import seen_of

__all__ = ["SIGMAS", "DeviceTrack"]

SIGMAS = 3.0  # standard errors of what a power sensor did not see that belong to a band


class DeviceTrack:
    """Accumulates one device's energy over one segment, in integer millijoules.

    `energy_mj`   sum over intervals between two valid reads; None before the first valid read
    `covered_ns`  length of those intervals
    `unseen_mj2`  square of the standard error of `energy_mj` for an integrated sensor, which at one read a second sees
                  the share `seen` of the time, and less where it is read more rarely
    An interval in which the counter fell (driver reloaded) is left out. One with failed reads inside counts for a
    counter, which went on by itself, and is left out for a sensor that was integrated by reading it.

    What was not seen is judged by how far the reads differ. An interval's mean power is that of two reads of variance
    v; from one interval to the next it changes by v / 2 in the mean square; n reads, dt apart, sum up to an energy of
    variance n v dt^2. True for loads that do not repeat in step with the reads. For means over a second, which are one
    read an interval, it is up to twice the error.
    """

    def __init__(self, source: str, seen: float = 1.0) -> None:
        self._runs_by_itself = source in COUNTERS + ESTIMATES
        self.energy_mj: int | None = None
        self.covered_ns = 0
        self.unseen_mj2 = 0.0
        self.last_ns = 0
        self.last_raw_mj: int | None = None
        self._failing = False
        self._seen = seen if source == "integrated" else None
        self._power_w: float | None = None  # mean of the interval before

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
            if self._seen is not None and at_ns > self.last_ns:
                self._judge_unseen(raw_mj - self.last_raw_mj, (at_ns - self.last_ns) / 1e9, self._seen)
        self._failing = False
        self.last_ns, self.last_raw_mj = at_ns, raw_mj
        return event

    def _judge_unseen(self, energy_mj: int, elapsed_s: float, seen: float) -> None:
        before_w, self._power_w = self._power_w, energy_mj / 1000 / elapsed_s
        if before_w is not None:
            unseen = 1.0 - seen_of(elapsed_s, seen)
            self.unseen_mj2 += 2 * unseen * ((self._power_w - before_w) * 1000 * elapsed_s) ** 2
