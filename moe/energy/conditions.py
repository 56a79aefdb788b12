"""What devices worked under, kept once a minute on `reading` lines; and the counter checked against the power there.

    temperature_c   of the chip             power_limit_w  the limit in force
    sm_clock_mhz    of the processors       power_w        as the power sensor tells it
    throttle        what holds the clock down, []: nothing

Readers that do not know these fields skip them. A counter and a power sensor that differ by more than 3 %, and by more
than the spread of the pairs explains, are reported: one of them is wrong, and nothing here can tell which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

__all__ = ["CONDITIONS_S", "PowerCheck", "check_power", "pick_conditions", "summarize"]

CONDITIONS_S = 60.0  # between two looks; also one at the first and at the last reading
TOLERANCE = 0.03
LEAST_PAIRS = 5
SIGMAS = 3.0

_NUMBERS = ("temperature_c", "sm_clock_mhz", "power_limit_w", "power_w")


def pick_conditions(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `reading` line that tell conditions; {} on most lines."""
    return {name: record[name] for name in (*_NUMBERS, "throttle") if name in record}


def summarize(looks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Least, mean and greatest of each number, and the share of looks at which each reason held the clock down."""
    summary: dict[str, Any] = {}
    for name in _NUMBERS:
        values = [look[name] for look in looks if name in look]
        if values:
            summary[name] = {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
    told = [look["throttle"] for look in looks if "throttle" in look]
    if told:
        reasons = sorted({reason for look in told for reason in look})
        summary["throttle"] = {reason: sum(reason in look for look in told) / len(told) for reason in reasons}
    return summary


@dataclass(frozen=True, kw_only=True)
class PowerCheck:
    """`ratio`: power sensor over counter, `error` its standard error, from `num_pairs` seconds read by both."""

    ratio: float
    error: float
    num_pairs: int

    @property
    def disagrees(self) -> bool:
        """Whether the two are apart by more than 3 %, surely."""
        return self.num_pairs >= LEAST_PAIRS and abs(self.ratio - 1) > max(TOLERANCE, SIGMAS * self.error)


def check_power(pairs: Sequence[tuple[float, float]]) -> PowerCheck | None:
    """Compare (watts of the sensor, watts of the counter) over the same seconds; None with nothing to compare."""
    counted = sum(counter_w for _, counter_w in pairs)
    if len(pairs) < 2 or counted <= 0:
        return None
    ratio = sum(sensor_w for sensor_w, _ in pairs) / counted
    squares = sum((sensor_w - ratio * counter_w) ** 2 for sensor_w, counter_w in pairs)
    error = sqrt(squares / (len(pairs) - 1) * len(pairs)) / counted
    return PowerCheck(ratio=ratio, error=error, num_pairs=len(pairs))
