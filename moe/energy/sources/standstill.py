"""A counter that stands still: hardware that works always draws power, so no movement is a failed read, not 0 J."""

from moe.energy.clock import boottime_ns

__all__ = ["STUCK_S", "Standstill"]

STUCK_S = 2.0  # at least twenty ticks of the counters that are watched


class Standstill:
    """How long one counter has told the same number."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._moved_ns = 0

    def seconds(self, value: int) -> float:
        """Take a read in; returns seconds since the counter was first seen at this value."""
        now = boottime_ns()
        if value != self._last:
            self._last, self._moved_ns = value, now
        return (now - self._moved_ns) / 1e9

    def check(self, value: int) -> int:
        """The value as read. Raises ValueError when it has been the same for longer than STUCK_S."""
        still_s = self.seconds(value)
        if still_s > STUCK_S:
            raise ValueError(f"the energy counter has not moved for {still_s:.1f} s")
        return value
