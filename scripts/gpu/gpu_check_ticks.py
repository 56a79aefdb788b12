"""Arithmetic of the probe, on plain lists: quantiles, ticks of a counter, integrals of power."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

Point = tuple[int, float]  # nanoseconds, value


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, between neighbours by a straight line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Count, extremes and quantiles; only the count of nothing."""
    if not values:
        return {"n": 0}
    values = sorted(values)  # once: sorting what is sorted costs next to nothing
    shares = {"p1": 0.01, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}
    quantiles = {name: round(quantile(values, share), digits) for name, share in shares.items()}
    return {"n": len(values), "min": round(min(values), digits), **quantiles, "max": round(max(values), digits)}


def changes(points: Sequence[Point]) -> list[Point]:
    """The points at which the value is another than before; the first point is no change."""
    return [now for before, now in pairwise(points) if now[1] != before[1]]


def tick_summary(edges: Sequence[Point]) -> dict[str, object]:
    """Distribution of the time between a counter's changes, of their sizes, and of the power each stands for.

    >>> tick_summary([(0, 0), (100_000_000, 50_000), (200_000_000, 100_000)])["interval_ms"]["median"]
    100.0
    """
    pairs = list(pairwise(edges))
    return {
        "interval_ms": spread([(b[0] - a[0]) / 1e6 for a, b in pairs]),
        "size_mj": spread([b[1] - a[1] for a, b in pairs]),
        "power_w": spread([(b[1] - a[1]) / ((b[0] - a[0]) / 1e9) / 1000 for a, b in pairs if b[0] > a[0]]),
    }


def integral_j(points: Sequence[Point], start_ns: int, end_ns: int) -> float:
    """Joules under power in milliwatts between two moments, by trapezoids; the curve is level beyond its ends.

    >>> integral_j([(0, 100_000), (2 * 10**9, 100_000)], 0, 10**9)
    100.0
    """
    inside = [point for point in points if start_ns < point[0] < end_ns]
    curve = [(start_ns, _at(points, start_ns)), *inside, (end_ns, _at(points, end_ns))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve)) / 1e12


def _at(points: Sequence[Point], moment_ns: int) -> float:
    before = next((p for p in reversed(points) if p[0] <= moment_ns), points[0])
    after = next((p for p in points if p[0] >= moment_ns), points[-1])
    if after[0] <= before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (moment_ns - before[0]) / (after[0] - before[0])


def compare_with_counter(counter: Sequence[Point], powers: Mapping[str, Sequence[Point]]) -> dict[str, object]:
    """The counter's energy between its first and last change, and by how much each integrated power differs.

    Both ends lie on changes of the counter, so that its steps add no error.
    """
    edges = changes(counter)
    if len(edges) < 2:
        return {"error": f"the counter changed {len(edges)} times"}
    (start_ns, start_mj), (end_ns, end_mj) = edges[0], edges[-1]
    counter_j = (end_mj - start_mj) / 1000
    elapsed_s = (end_ns - start_ns) / 1e9
    found: dict[str, object] = {
        "elapsed_s": round(elapsed_s, 3),
        "counter_j": round(counter_j, 3),
        "counter_mean_w": round(counter_j / elapsed_s, 3),
        "changes": len(edges),
    }
    for name, points in powers.items():
        joules = integral_j(points, start_ns, end_ns)
        percent = 100 * (joules / counter_j - 1) if counter_j else None
        found[name] = {
            "integral_j": round(joules, 3),
            "percent_over_counter": percent if percent is None else round(percent, 3),
            "reads": len(points),
            "update_ms": spread([(b[0] - a[0]) / 1e6 for a, b in pairwise(changes(points))]),
        }
    return found
