"""A stretch of time and what it cost, without a trainer: `with meter.window("prefill") as window: …`.

A GPU's counter moves about every 100 ms, so two plain reads around one second of work are up to 10 % wrong. Here the
reader thread looks for the counter's next tick after each end of the window (a burst of reads, at most 100 ms), which
gives an exact pair of energy and time, and the energy at the end itself is interpolated within that tick. The thread
that does the work never waits; the result waits for the burst when it is asked for.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from types import TracebackType

from moe.energy.clock import boottime_ns
from moe.energy.sources.base import Device
from moe.energy.track import SIGMAS
from moe.errors import SensorError

__all__ = ["BURST_S", "Edge", "Sample", "Window"]

BURST_S = 0.1
SMOOTH_TICK_S = 0.002  # a sensor that moves at least this often has no tick worth finding
RESULT_WAIT_S = 2.0  # a reader that has not answered by then hangs in the driver


@dataclass(frozen=True)
class Sample:
    """One round of reads at a moment (boottime): by uuid the energy, and what `DeviceTrack` knows of it."""

    at_ns: int
    energies_mj: Mapping[str, int | None]
    covered_ns: Mapping[str, int]
    unseen_mj2: Mapping[str, float]


@dataclass
class _Tick:
    """First sample after an edge, and the next tick once it is found (energies in mJ, times boottime ns)."""

    first_ns: int
    first_mj: int
    seen_ns: int
    tick_ns: int | None = None
    tick_mj: int = 0


class Edge:
    """One end of a window: collects samples from the reader until each device's counter has ticked."""

    def __init__(self, devices: tuple[Device, ...]) -> None:
        self.at_ns = boottime_ns()
        self.resolved = threading.Event()
        self.covered_ns: Mapping[str, int] = {}
        self.unseen_mj2: Mapping[str, float] = {}
        self._devices = devices
        self._ticks: dict[str, _Tick] = {}
        self._first_ns: int | None = None

    def offer(self, sample: Sample) -> bool:
        """Take a sample in; True when no further one is needed. Failed devices are not waited for."""
        at_ns = sample.at_ns
        if self._first_ns is None:
            self._first_ns, self.covered_ns, self.unseen_mj2 = at_ns, sample.covered_ns, sample.unseen_mj2
        for device in self._devices:
            energy_mj = sample.energies_mj.get(device.uuid)
            if energy_mj is None:
                continue
            tick = self._ticks.setdefault(device.uuid, _Tick(at_ns, energy_mj, at_ns))
            if tick.tick_ns is not None or at_ns == tick.first_ns:
                continue
            if _moves_with_each_read(device):
                tick.tick_ns, tick.tick_mj = at_ns, energy_mj
            elif energy_mj != tick.first_mj:
                tick.tick_ns, tick.tick_mj = (tick.seen_ns + at_ns) // 2, energy_mj
            tick.seen_ns = at_ns
        waiting = any(tick.tick_ns is None for tick in self._ticks.values())
        done = at_ns > self._first_ns and (not waiting or at_ns - self._first_ns >= BURST_S * 1e9)
        if done:
            self.resolved.set()
        return done

    def energy_mj(self, device: Device, mean_mw: float = 0.0) -> tuple[float, float] | None:
        """(energy at the edge, how far it can be off) in mJ; None when the device could not be read.

        `mean_mw` is the power of the whole window: it stands for that at an end where nothing tells of any.
        """
        tick = self._ticks.get(device.uuid)
        if tick is None:
            return None
        if tick.tick_ns is None:
            power_mw = (device.p_max_w or 0.0) * 1000 or mean_mw
            return float(tick.first_mj), power_mw * (device.tick_s + (tick.first_ns - self.at_ns) / 1e9)
        step_mj = tick.tick_mj - tick.first_mj
        if _moves_with_each_read(device):
            length_ns = max(1, tick.tick_ns - tick.first_ns)
            energy_mj = tick.first_mj - step_mj * (tick.first_ns - self.at_ns) / length_ns
            if device.source != "integrated":
                return energy_mj, float(step_mj)
            # of a mean over the last tick_s, up to half can lie on the other side of the edge
            power_mw = (device.p_max_w or 0.0) * 1000 or step_mj * 1e9 / length_ns
            return energy_mj, power_mw * device.tick_s / 2
        # the counter held `first_mj` for one tick up to `tick_ns`; before that it may have ticked after the edge
        energy_mj = tick.tick_mj - step_mj * (tick.tick_ns - self.at_ns) / (device.tick_s * 1e9)
        p_max_mw = (device.p_max_w or 0.0) * 1000 or step_mj / device.tick_s
        late_s = min(tick.first_ns - self.at_ns, max(0, tick.tick_ns - self.at_ns - device.tick_s * 1e9)) / 1e9
        return energy_mj, min(float(step_mj), p_max_mw * device.tick_s) + p_max_mw * late_s

    def mean_mw(self, end: "Edge", uuid: str) -> float:
        """A device's mean power from the first sample of this edge to that of a later one; 0 where one has none."""
        first, last = self._ticks.get(uuid), end._ticks.get(uuid)
        if first is None or last is None or last.first_ns <= first.first_ns:
            return 0.0
        return (last.first_mj - first.first_mj) * 1e9 / (last.first_ns - first.first_ns)


def _moves_with_each_read(device: Device) -> bool:
    """Whether there is no tick to find: integrated power, and counters so quick that none is worth finding."""
    return device.source == "integrated" or device.tick_s <= SMOOTH_TICK_S


class Window:
    """The result. Its numbers can be asked for after the with block; before, they raise SensorError.

    energy_j   joules of all readable devices, None when no device could be read
    elapsed_s  length of the block; start_ns, end_ns are its ends (boottime)
    coverage   share of devices x time between valid reads
    band_j     sensor gain, plus what the ticks at both ends leave open, plus what a power sensor did not see
    by_device  {uuid: (energy_j, band_j)} of the readable devices
    source, scope   of the devices, several joined with "+"
    """

    def __init__(self, name: str, devices: tuple[Device, ...], request: Callable[[Edge], None]) -> None:
        self.name = name
        self.devices = devices
        self.source = "+".join(sorted({device.source for device in devices}))
        self.scope = "+".join(sorted({device.scope for device in devices}))
        self._request = request
        self._start: Edge | None = None
        self._end: Edge | None = None

    def __enter__(self) -> "Window":
        self._start = Edge(self.devices)
        self._request(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = Edge(self.devices)
        self._request(self._end)

    def _edges(self) -> tuple[Edge, Edge]:
        if self._start is None or self._end is None:
            raise SensorError(f"window {self.name!r} is still open: read its numbers after the with block")
        self._start.resolved.wait(RESULT_WAIT_S)
        self._end.resolved.wait(RESULT_WAIT_S)
        return self._start, self._end

    @property
    def start_ns(self) -> int:
        return self._edges()[0].at_ns

    @property
    def end_ns(self) -> int:
        return self._edges()[1].at_ns

    @property
    def elapsed_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def by_device(self) -> dict[str, tuple[float, float]]:
        start, end = self._edges()
        found = {}
        for device in self.devices:
            uuid, mean_mw = device.uuid, start.mean_mw(end, device.uuid)
            first, last = start.energy_mj(device, mean_mw), end.energy_mj(device, mean_mw)
            if first is None or last is None:
                continue
            energy_mj = max(0.0, last[0] - first[0])
            unseen_mj = sqrt(max(0.0, end.unseen_mj2.get(uuid, 0.0) - start.unseen_mj2.get(uuid, 0.0)))
            band_mj = energy_mj * device.band + first[1] + last[1] + SIGMAS * unseen_mj
            found[uuid] = (energy_mj / 1000, band_mj / 1000)
        return found

    @property
    def energy_j(self) -> float | None:
        parts = self.by_device.values()
        return sum(energy_j for energy_j, _ in parts) if parts else None

    @property
    def band_j(self) -> float | None:
        parts = self.by_device.values()
        return sum(band_j for _, band_j in parts) if parts else None

    @property
    def coverage(self) -> float:
        start, end = self._edges()
        wall_ns = (end.at_ns - start.at_ns) * len(self.devices)
        covered_ns = sum(end.covered_ns.get(d.uuid, 0) - start.covered_ns.get(d.uuid, 0) for d in self.devices)
        return min(1.0, max(0.0, covered_ns / wall_ns)) if wall_ns else 0.0
