"""What it cost a run to reach a loss, and how many times a baseline's cost that is.

A run is known only at its evaluations. The cost of reaching a loss is the first crossing of that curve, linear between
the two evaluations around it; beyond the last evaluation nothing is said. Positions below count evaluations: 0 is the
start of the run (cost 0, loss unknown), 1 the first evaluation, 1.25 a quarter of the way to the second.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe.compare.runs import Run

__all__ = ["AXES", "METHOD", "UNITS", "Crossing", "Ratio", "Span", "cheapest_ratio", "cross", "reachable", "scores"]

AXES = {"tokens": "tokens", "device_hours": "device-hours", "energy": "energy"}
"""Cost axes: the key of a ratio and its name in a sentence."""

UNITS = ("nats per token", "bits per byte")

_Z = 1.96  # two-sided 95 % of a normal distribution

METHOD = (
    "The first crossing of the evaluation curve, linear between the two evaluations around it; the interval spans "
    "those two evaluations and the crossings of the curve shifted by 1.96 standard errors of the evaluation. "
    "One run a side, so seed-to-seed variation is not included."
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
class Ratio:
    """Cost of `baseline` to reach a loss over that of `run`: above 1, the run was the cheaper one. n: runs a side."""

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


def cheapest_ratio(axis: str, run: tuple[Run, Crossing], baselines: Sequence[tuple[Run, Crossing]]) -> Ratio | None:
    """The ladder's ratio on one axis: against the baseline that reached the loss at the lowest cost.

    Its interval is the envelope's: the lowest of the baselines' lows to the lowest of their highs. None when a side
    did not reach the loss, or was not priced on this axis, or paid nothing.
    """
    spans = {
        index: span
        for index, (baseline, crossing) in enumerate(baselines)
        if (span := _divide(axis, run, (baseline, crossing))) is not None
    }
    if not spans:
        return None
    best = min(spans, key=lambda index: spans[index].value)
    highs = [span.high for span in spans.values() if span.high is not None]
    envelope = Span(
        spans[best].value, min(span.low for span in spans.values()), min(highs) if highs else spans[best].high
    )
    method = METHOD
    if len(baselines) > 1:
        method += f" The baseline is the cheapest of those that reached the loss ({len(spans)} of {len(baselines)})."
    if axis == "energy":
        method += (
            " Both sides were measured by the same devices, so the gain of their sensors cancels."
            if _same_devices(run[0], baselines[best][0])
            else " The sides were measured by different devices, so the declared gain of both sensors widens it."
        )
    return Ratio(run[0].name, baselines[best][0].name, envelope, 1, method)


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


def _divide(axis: str, run: tuple[Run, Crossing], baseline: tuple[Run, Crossing]) -> Span | None:
    above, below = baseline[1].costs.get(axis), run[1].costs.get(axis)
    if above is None or below is None or below.value <= 0 or above.value <= 0:
        return None
    up = down = (0.0, 0.0)
    if axis == "energy":
        same = _same_devices(run[0], baseline[0])
        up, down = _band(baseline[0], above, same), _band(run[0], below, same)
    cheapest, dearest = max(0.0, below.low - down[0]), None if below.high is None else below.high + down[1]
    low = 0.0 if dearest is None else max(0.0, above.low - up[0]) / dearest
    high = None if above.high is None or cheapest <= 0 else (above.high + up[1]) / cheapest
    return Span(above.value / below.value, low, high)


def _band(run: Run, span: Span, same_devices: bool) -> tuple[float, float]:
    """Joules that `span` widens by, below and above: quantisation and lost windows, and the gain where it stays."""
    rest_j = max(0.0, run.energy_band_j - run.energy_gain * (run.energy_j or 0.0))
    gain = 0.0 if same_devices else run.energy_gain
    return rest_j + gain * span.low, rest_j + gain * (span.high or 0.0)


def _same_devices(run: Run, baseline: Run) -> bool:
    return bool(run.device_uuids) and run.device_uuids == baseline.device_uuids
