"""Energy from a sensor that tells only power, in integer millijoules.

Power of the moment is integrated as a trapezoid over the reads. A mean over the last second is taken for the whole time
since the read before: read once a second, that is exact, where a trapezoid would tell every change half a second late.
Reads twice as far apart as that leave a gap, for of half the time such a mean tells nothing.
"""

from moe.energy.clock import boottime_ns

__all__ = ["MAX_STEP_S", "READ_EVERY_S", "PowerIntegral"]

READ_EVERY_S = 1.0  # the longest interval at which a meter may read power, for it to say what was used between
MAX_STEP_S = 5.0  # two reads of a moment's power further apart than this say nothing about the time between
MAX_TRAILING_S = 2 * READ_EVERY_S  # the same for two means over a second


class PowerIntegral:
    """The energy since the first read. `trailing`: the sensor tells a mean over the time before the read."""

    def __init__(self, trailing: bool = False) -> None:
        self._trailing = trailing
        self._max_step_s = MAX_TRAILING_S if trailing else MAX_STEP_S
        self._energy_mj = 0.0
        self._last: tuple[int, float] | None = None  # boottime_ns, power_mw

    def add(self, power_mw: float) -> int:
        """Take a read in; returns millijoules so far. Raises ValueError when the read before it is too long ago."""
        now = boottime_ns()
        last, self._last = self._last, (now, power_mw)
        if last is not None:
            elapsed_s = (now - last[0]) / 1e9
            if elapsed_s > self._max_step_s:
                raise ValueError(f"no power read for {elapsed_s:.1f} s")
            self._energy_mj += elapsed_s * (power_mw if self._trailing else (power_mw + last[1]) / 2)
        return int(self._energy_mj)

    def forget(self) -> None:
        """A read failed: nothing is known of the time around it."""
        self._last = None
