"""GPUs whose power is scripted, and when to measure them: what the accuracy of energy meters is tested on.

All of it follows from a seed. Power: steps (levels held for 0.5 to 8 s), ramps (1 to 8 s from level to level, three in
ten ending in a step) and bursts (two levels in turns, 0.05 to 2 s a cycle, each turn off by up to 10 % of its length).
Levels lie between 80 W and 700 W, the limit. Counters tick every 100 ms, up to 5 ms early or late, each GPU in its own
phase; power sensors change every 100 ms and tell a mean of the last second, or of the last 25 ms.
"""

import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "energy"))  # the fake node is the tests' own

from fake_node import FakeGpu, FakeNode, Knot, PowerScript, compile_library  # noqa: E402

__all__ = [
    "LIMIT_W",
    "NS",
    "TICK_S",
    "FakeGpu",
    "FakeNode",
    "Plan",
    "Span",
    "compile_library",
    "gpus",
    "sequence",
    "spans",
]

LIMIT_W = 700  # what the library gives as the largest limit
PERIOD_S = 30
TICK_S = 0.1
GAIN_SPREAD = 50  # thousandths either way
SHAPES = ("steps", "ramps", "bursts")
NS = 10**9

# what the library says of each; the latter two have no counter, so their power is integrated
CHIPS: dict[str, dict[str, Any]] = {
    "counter": {"arch": 9, "average": 1},
    "average": {"arch": 9, "average": 1, "mode": "unsupported"},
    "instant": {"arch": 7, "average": 0, "mode": "unsupported"},
}


@dataclass(frozen=True)
class Span:
    """A window to be measured, in seconds after the epoch; up to a tick longer than `length_s`.

    Were it whole ticks long, a plain read at each end would fall into the same part of one, and find no error.
    """

    name: str
    length_s: float
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Plan:
    """What one tool shall measure: GPUs by UUID (NVML's order), and spans after a moment of the boottime clock."""

    uuids: list[str]
    epoch_ns: int
    spans: list[Span]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gpus(chip: str, number: int, seed: int, epoch_ns: int, *, exact: bool = False) -> list[FakeGpu]:
    """GPUs of one chip, their shapes in turn; gains within 5 %, or all 1 (`exact`)."""
    rng = random.Random(f"{chip} {seed} {exact}")
    made = []
    for place in range(number):
        shape = SHAPES[place % len(SHAPES)]
        gain = 1000 if exact else rng.randint(1000 - GAIN_SPREAD, 1000 + GAIN_SPREAD)
        script = PowerScript(
            knots=_knots(shape, rng), counter_gain=gain, jitter_ns=5_000_000, power_tick_ns=round(TICK_S * NS),
            instant_ns=25_000_000,
        )  # fmt: skip
        uuid = f"GPU-{chip}-{'exact' if exact else 'gain'}-{shape}-{place}"
        origin_ns = epoch_ns - round(rng.uniform(5, 5 + PERIOD_S) * NS)
        made.append(FakeGpu(uuid=uuid, origin_ns=origin_ns, script=script, gain=gain, **CHIPS[chip]))
    return made


def _knots(shape: str, rng: random.Random) -> tuple[Knot, ...]:
    now_ns, end_ns = 0, PERIOD_S * NS
    low, high = _watts(rng, 80, 300), _watts(rng, 350, LIMIT_W)
    cycle_s, duty = rng.uniform(0.05, 2), rng.uniform(0.2, 0.8)
    level = _watts(rng, 80, LIMIT_W)
    knots: list[Knot] = [(0, level)] if shape == "ramps" else []
    busy = True
    while now_ns < end_ns:
        before_ns = now_ns
        if shape == "bursts":
            level, busy = high if busy else low, not busy
            now_ns += round(cycle_s * (1 - duty if busy else duty) * rng.uniform(0.9, 1.1) * NS)
        else:
            level = _watts(rng, 80, LIMIT_W)
            now_ns += round(rng.uniform(0.5 if shape == "steps" else 1, 8) * NS)
        now_ns = min(now_ns, end_ns)
        knots += [(now_ns, level)] if shape == "ramps" else [(before_ns, level), (now_ns, level)]
        if shape == "ramps" and rng.random() < 0.3:
            knots.append((now_ns, _watts(rng, 80, LIMIT_W)))
    if knots[-1][0] == knots[-2][0]:  # a step at the very end would have no length
        knots.pop()
    return tuple(knots)


def _watts(rng: random.Random, low: float, high: float) -> int:
    return round(rng.uniform(low, high) * 1000)  # in milliwatts, as everything here


def spans(lengths_s: dict[float, int], within_s: float, seed: int) -> list[Span]:
    """So many spans of each length, at random places within a time; they overlap."""
    rng = random.Random(seed)
    found = []
    for length_s, number in lengths_s.items():
        for n in range(number):
            span_s = length_s + rng.uniform(0, TICK_S)
            start_s = rng.uniform(0, within_s - span_s)
            found.append(Span(f"{length_s:g} s, {n}", length_s, start_s, start_s + span_s))
    return found


def sequence(lengths_s: dict[float, int], seed: int) -> list[Span]:
    """So many spans of each length, one after the other in a random order, with 0.3 to 0.5 s between them."""
    rng = random.Random(seed)
    lengths = [length_s for length_s, number in lengths_s.items() for _ in range(number)]
    rng.shuffle(lengths)
    found, now_s = [], 0.0
    for n, length_s in enumerate(lengths):
        start_s = now_s + rng.uniform(0.3, 0.5)
        now_s = start_s + length_s + rng.uniform(0, TICK_S)
        found.append(Span(f"{length_s:g} s, {n}", length_s, start_s, now_s))
    return found
