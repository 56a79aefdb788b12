"""Energy from a sensor that tells only power, in integer millijoules.

Power of the moment is integrated as a trapezoid over the reads. A mean over the last second is taken for the whole time
since the read before: read once a second, that is exact, where a trapezoid would tell every change half a second late.
Read more rarely it sees only a part of the time, and the band must hold the rest (`seen_of`).
"""

from moe.energy.clock import boottime_ns

__all__ = ["MAX_STEP_S", "READ_EVERY_S", "PowerIntegral", "seen_of"]

READ_EVERY_S = 1.0  # the longest interval at which a meter may be asked to read power
GRAIN_S = 0.1  # how often a mean over a second moves: reads that much further apart than a second leave nothing out
MAX_STEP_S = 5.0  # two reads further apart than this say nothing about the time between


def seen_of(elapsed_s: float, seen: float) -> float:
    """The share of an interval that a power sensor saw which sees `seen` of the time at one read a second."""
    return seen * min(1.0, (READ_EVERY_S + GRAIN_S) / elapsed_s)


class PowerIntegral:
    """The energy since the first read. `trailing`: the sensor tells a mean over the time before the read."""

    def __init__(self, trailing: bool = False) -> None:
        self._trailing = trailing
        self._energy_mj = 0.0
        self._last: tuple[int, float] | None = None  # boottime_ns, power_mw

    def add(self, power_mw: float) -> int:
        """Take a read in; returns millijoules so far. Raises ValueError when the read before it is too long ago."""
        now = boottime_ns()
        last, self._last = self._last, (now, power_mw)
        if last is not None:
            elapsed_s = (now - last[0]) / 1e9
            if elapsed_s > MAX_STEP_S:
                raise ValueError(f"no power read for {elapsed_s:.1f} s")
            self._energy_mj += elapsed_s * (power_mw if self._trailing else (power_mw + last[1]) / 2)
        return int(self._energy_mj)

    def forget(self) -> None:
        """A read failed: nothing is known of the time around it."""
        self._last = None
