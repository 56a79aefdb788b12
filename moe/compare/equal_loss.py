"""What it cost a run to reach a loss, and how many times a baseline's cost that is.

A run is known only at its evaluations. The cost of reaching a loss is the first crossing of that curve, linear between
the two evaluations around it; beyond the last evaluation nothing is said. Positions below count evaluations: 0 is the
start of the run (cost 0, loss unknown), 1 the first evaluation, 1.25 a quarter of the way to the second.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from moe.compare.runs import Run

__all__ = [
    "AXES",
    "METHOD",
    "UNITS",
    "Crossing",
    "Ratio",
    "Side",
    "Span",
    "cheapest_ratio",
    "cross",
    "reachable",
    "scores",
]

AXES = {"tokens": "tokens", "device_hours": "device-hours", "energy": "energy"}
"""Cost axes: the key of a ratio and its name in a sentence."""

UNITS = ("nats per token", "bits per byte")

_Z = 1.96  # two-sided 95 % of a normal distribution

METHOD = (
    "The first crossing of the evaluation curve, linear between the two evaluations around it; the interval spans "
    "those two evaluations and the crossings of the curve shifted by 1.96 standard errors of the evaluation."
)


@dataclass(frozen=True)
class Span:
    """A cost or a ratio with its interval. `high` is None when the interval is open: no evaluation bounds it."""

    value: float
    low: float
    high: float | None


@dataclass(frozen=True)
class Crossing:
    """Where a run reached `loss`: a span of cost on every axis the run was priced on; empty when it never did."""

    loss: float
    costs: Mapping[str, Span]

    @property
    def reached(self) -> bool:
        return bool(self.costs)


@dataclass(frozen=True)
class Side:
    """Runs that differ in nothing but seed and name, with their crossings at one loss: usually a single run."""

    runs: tuple[Run, ...]
    crossings: tuple[Crossing, ...]

    @property
    def label(self) -> str:
        name = self.runs[0].name
        return name if len(self.runs) == 1 else f"{name} (median of {len(self.runs)} runs)"

    @property
    def device_uuids(self) -> frozenset[str]:
        return frozenset().union(*(run.device_uuids for run in self.runs))

    def cost(self, axis: str) -> Span | None:
        """The median cost, from the lowest low to the highest high; None unless every one of the runs has one."""
        spans = [crossing.costs[axis] for crossing in self.crossings if axis in crossing.costs]
        if len(spans) < len(self.runs):
            return None
        highs = [span.high for span in spans if span.high is not None]
        return Span(
            median(span.value for span in spans),
            min(span.low for span in spans),
            max(highs) if len(highs) == len(spans) else None,
        )


@dataclass(frozen=True)
class Ratio:
    """Cost of `baseline` to reach a loss over that of `run`: above 1, the run was the cheaper one.

    `run` and `baseline` are the sides' labels; `n` counts the runs of the side that has fewer.
    """

    run: str
    baseline: str
    span: Span
    n: int
    method: str


def scores(run: Run, unit: str) -> list[tuple[float, float]]:
    """(loss, its standard error) of each evaluation in `unit`; a standard error that was not recorded counts as 0."""
    pairs = []
    for point in run.curve:
        error = point.loss_se or 0.0
        if unit == UNITS[0]:
            pairs.append((point.loss, error))
        else:
            assert point.bits_per_byte is not None
            pairs.append((point.bits_per_byte, error * point.bits_per_byte / point.loss if point.loss else 0.0))
    return pairs


def reachable(run: Run, unit: str) -> float:
    """The lowest loss the run reached with 1.96 standard errors to spare: its interval of cost is closed there."""
    return min(loss + _Z * error for loss, error in scores(run, unit))


def first_may_reach(run: Run, unit: str, loss: float) -> bool:
    """Whether the first evaluation may be at `loss` already, its standard error considered."""
    value, error = scores(run, unit)[0]
    return value - _Z * error <= loss


def cross(run: Run, unit: str, loss: float) -> Crossing:
    """The cost at which `run` first reached `loss`, on each of the axes its evaluations are priced on."""
    curve = scores(run, unit)
    position = _first(curve, loss, 0.0)
    if position is None:
        return Crossing(loss, {})
    early, late = _first(curve, loss, -_Z), _first(curve, loss, _Z)
    assert early is not None  # a lower curve crosses no later
    low = min(early, math.ceil(position) - 1) if early > 1 else 0.0
    high = None if late is None else max(late, math.ceil(position))
    costs = {}
    for axis in AXES:
        priced = [_cost(run, axis, index) for index in range(len(run.curve))]
        if None not in priced:
            cost = [0.0, *[price for price in priced if price is not None]]
            costs[axis] = Span(_at(cost, position), _at(cost, low), None if high is None else _at(cost, high))
    return Crossing(loss, costs)


def cheapest_ratio(axis: str, side: Side, ladder: Sequence[Side]) -> Ratio | None:
    """The ladder's ratio on one axis: against the baseline that reached the loss at the lowest cost.

    Its interval is the envelope's: the lowest of the baselines' lows to the lowest of their highs. None when a side
    did not reach the loss, or was not priced on this axis, or paid nothing.
    """
    spans = {index: span for index, rung in enumerate(ladder) if (span := _divide(axis, side, rung)) is not None}
    if not spans:
        return None
    best = min(spans, key=lambda index: spans[index].value)
    highs = [span.high for span in spans.values() if span.high is not None]
    low = min(span.low for span in spans.values())
    envelope = Span(spans[best].value, low, min(highs) if highs else None)
    method = [METHOD, _seeds(side, ladder[best])]
    if len(ladder) > 1:
        method.append(f"The baseline is the cheapest of those that reached the loss ({len(spans)} of {len(ladder)}).")
    if axis == "energy" and _same_devices(side, ladder[best]):
        method.append("In the energy ratio the gain of the sensors cancels: the same devices measured both sides.")
    elif axis == "energy":
        method.append("Different devices measured the sides, so their declared gain widens the energy interval.")
    n = min(len(side.runs), len(ladder[best].runs))
    return Ratio(side.label, ladder[best].label, envelope, n, " ".join(method))


def _seeds(side: Side, baseline: Side) -> str:
    counts = len(side.runs), len(baseline.runs)
    if max(counts) == 1:
        return "One run a side, so seed-to-seed variation is not included."
    return (
        f"Medians of {counts[0]} and {counts[1]} runs that differ in seed alone; the interval spans them all, "
        "and shows seed-to-seed variation only as far as so few runs can."
    )


def _first(curve: Sequence[tuple[float, float]], target: float, shift: float) -> float | None:
    """Position of the first crossing of the curve shifted by `shift` standard errors, or None."""
    losses = [loss + shift * error for loss, error in curve]
    for index, loss in enumerate(losses):
        if loss <= target:
            before = losses[index - 1]
            return 1.0 if index == 0 else index + (before - target) / (before - loss)
    return None


def _at(cost: Sequence[float], position: float) -> float:
    left = min(int(position), len(cost) - 2)
    return cost[left] + (position - left) * (cost[left + 1] - cost[left])


def _cost(run: Run, axis: str, index: int) -> float | None:
    point = run.curve[index]
    return {"tokens": float(point.tokens), "device_hours": point.device_hours, "energy": point.energy_j}[axis]


def _divide(axis: str, side: Side, baseline: Side) -> Span | None:
    above, below = baseline.cost(axis), side.cost(axis)
    if above is None or below is None or below.value <= 0 or above.value <= 0:
        return None
    up = down = (0.0, 0.0)
    if axis == "energy":
        same = _same_devices(side, baseline)
        up, down = _band(baseline, above, same), _band(side, below, same)
    cheapest, dearest = max(0.0, below.low - down[0]), None if below.high is None else below.high + down[1]
    low = 0.0 if dearest is None else max(0.0, above.low - up[0]) / dearest
    high = None if above.high is None or cheapest <= 0 else (above.high + up[1]) / cheapest
    return Span(above.value / below.value, low, high)


def _band(side: Side, span: Span, same_devices: bool) -> tuple[float, float]:
    """Joules that `span` widens by, below and above: quantisation and lost windows, and the gain where it stays."""
    rest_j = max(max(0.0, run.energy_band_j - run.energy_gain * (run.energy_j or 0.0)) for run in side.runs)
    gain = 0.0 if same_devices else max(run.energy_gain for run in side.runs)
    return rest_j + gain * span.low, rest_j + gain * (span.high or 0.0)


def _same_devices(side: Side, baseline: Side) -> bool:
    return bool(side.device_uuids) and side.device_uuids == baseline.device_uuids
