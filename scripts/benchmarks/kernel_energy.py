"""What a call costs in joules: the call again and again for some seconds between two ends of a meter's window."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from moe.energy import EnergyMeter

__all__ = ["Energy", "joules_per_call"]

WARM_S = 1.0  # clocks and temperature follow the load
BATCH_S = 0.2  # of calls queued before the host waits for the device


class Energy(NamedTuple):
    """joules a call, what the device drew on average, its clock at the end, and how well that is known."""

    joules: float
    watts: float
    clock_mhz: int | None
    calls: int
    seconds: float
    band_j: float
    source: str
    scope: str


def joules_per_call(run: Callable[[], object], seconds: float) -> Energy:
    """Mean over `seconds` of calls one right after the other, caches warm."""
    start = time.perf_counter()
    calls = 0
    while time.perf_counter() - start < min(WARM_S, seconds):
        run()
        _wait()
        calls += 1
    batch = max(1, int(BATCH_S * calls / (time.perf_counter() - start)))
    calls = 0
    with EnergyMeter(devices=_gpu_uuids()) as meter:
        with meter.window("calls") as window:
            start, clock_mhz = time.perf_counter(), None
            while time.perf_counter() - start < seconds:
                for _ in range(batch):
                    run()
                clock_mhz = _clock_mhz()  # while the device is at work
                _wait()
                calls += batch
        energy_j = window.energy_j  # the meter still reads, and finds the counter's next tick
    if energy_j is None:
        raise SystemExit(f"no energy could be read from {window.source}: nothing is told")
    return Energy(
        energy_j / calls, energy_j / window.elapsed_s, clock_mhz, calls, round(window.elapsed_s, 3),
        window.band_j or 0.0, window.source, window.scope,
    )  # fmt: skip


def _gpu_uuids() -> list[str]:
    """The GPU in use; none where there is none, which means the host."""
    return [f"GPU-{torch.cuda.get_device_properties().uuid}"] if torch.cuda.is_available() else []


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _clock_mhz() -> int | None:
    """Of the multiprocessors; None without a GPU."""
    return torch.cuda.clock_rate() if torch.cuda.is_available() else None
