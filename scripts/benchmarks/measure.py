"""How benchmarks time and what they print: everyone in turn, medians, one JSON object a line.

On a GPU a call is timed by the device's own events, after the L2 cache was overwritten, so that nobody finds there what
the one before left, and while the device sleeps the host issues the call. On a CPU by the clock.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Times", "hardware", "note", "paired_ratio", "print_line", "race"]

Times = dict[str, list[float]]

FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU
SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host issues the call: short kernels do not wait for it
SPIN_S = 0.03  # so long OpenMP's threads of the one before may still turn on a processor, waiting for work
WARM_UP = 2
SLOW, SLOW_ROUNDS = 6.0, 3  # what takes so many times the fastest's time is timed in so many rounds only


def race(
    work: Mapping[str, Callable[[], object]], device: str, rounds: int, fresh: Callable[[], object] = lambda: None,
    *, lead: int = 0,
) -> Times:  # fmt: skip
    """Milliseconds by name: one round after another, everyone in turn; two rounds of warm-up.

    Each round begins with another one, for what the one before leaves in the machine is not the same for all.
    fresh: called before each round, to make the batch that all of it shares.
    lead: calls before the timed one, in the same turn: a step of a training finds the machine as a step left it, and
    not as a dozen other programs did.
    """
    timer = _GpuTimer() if device == "cuda" else _CpuTimer()
    first: Times = {name: [] for name in work}
    for _ in range(WARM_UP):
        fresh()
        for name, run in work.items():
            first[name].append(timer.once(run))
    fastest = min(min(times) for times in first.values())
    times: Times = {name: [] for name in work}
    for number in range(rounds):
        fresh()
        turns = list(work.items())
        first_turn = number % len(turns)
        for name, run in turns[first_turn:] + turns[:first_turn]:
            if number < SLOW_ROUNDS or min(first[name]) <= SLOW * fastest:
                for _ in range(lead):
                    run()
                times[name].append(timer.once(run))
    return times


class _CpuTimer:
    def once(self, run: Callable[[], object]) -> float:
        time.sleep(SPIN_S)
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3


class _GpuTimer:
    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def once(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def paired_ratio(times: Times, ours: str, peer: str) -> float:
    """Median over the rounds of peer / ours, each pair measured one right after the other."""
    return statistics.median(b / a for a, b in zip(times[ours], times[peer], strict=False))


def hardware(device: str = "cpu") -> str:
    """The GPU's name, or the processor and the threads used."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def print_line(
    bench: str, case: str, *, ours: float, peer: float | None, peer_name: str, unit: str, ratio: float | None,
    floor_fraction: float | None, hardware: str, config: dict[str, Any],
) -> None:  # fmt: skip
    """One line of a benchmark; ratio above 1 means ours is better."""
    line = {
        "bench": bench, "case": case, "ours": _short(ours), "peer": _short(peer), "peer_name": peer_name, "unit": unit,
        "ratio": _short(ratio), "floor_fraction": _short(floor_fraction), "hardware": hardware, "config": config,
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def note(text: str) -> None:
    """A sentence that a reader of the numbers must know; not among them."""
    print(text, file=sys.stderr, flush=True)
