"""The one thread that talks to sensors: a reading every interval, and short bursts at the ends of windows.

It is a daemon, so a finished or dead program never waits for it, and nothing it meets leaves it: a failed read is a
gap, an unexpected error is said once on stderr and the next interval tries again.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe.energy.clock import boottime_ns
from moe.energy.conditions import CONDITIONS_S
from moe.energy.sources.base import Conditioned, Source
from moe.energy.track import DeviceTrack
from moe.energy.window import Edge, Sample

__all__ = ["Reader", "Reading"]

POLL_S = 0.003  # between the reads of a burst
SHARE = 0.0005  # of one processor, which the thread may take
PROMPT_S = 1.0  # intervals shorter than this are kept whatever they cost
STOP_WAIT_S = 5.0  # a reader that has not stopped by then hangs in the driver


@dataclass(frozen=True)
class Reading:
    """One round of reads: the counters' own values, and the gaps that showed up with them ((uuid, event, reason)).

    Once a minute, at the first and at the last also `conditions` by uuid, and `node_mj`, the whole node's counter.
    """

    at_ns: int
    raw_mj: dict[str, int | None]
    gaps: list[tuple[str, str, str]]
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    node_mj: int | None = None


class Reader:
    """Reads `sources` every `interval_s` and passes each Reading to `on_reading`, with the seconds to the next one.

    A thread that sleeps most of the time finds everything cold: a round costs half a millisecond of processor time, and
    more with many devices whose driver is slow. Where that comes to more than SHARE, readings are rarer, but every
    `longest_s` there is one; intervals below PROMPT_S are kept as they are.
    `node` is a counter of the whole node: read beside the devices now and then, never added to them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        interval_s: float,
        longest_s: float,
        on_reading: Callable[[Reading, float], None],
        node: Source | None = None,
    ) -> None:
        self.devices = tuple(device for source in sources for device in source.devices)
        self.tracks = {device.uuid: DeviceTrack(device.source, device.seen) for device in self.devices}
        self.power_w: float | None = None
        self._sources = sources
        self._node = node
        self._look_due_ns = 0
        self._interval_s, self._longest_s = interval_s, longest_s
        self._spent_s = self._paid = 0.0  # processor time of the thread; when it will be SHARE of the time
        self._on_reading = on_reading
        self._edges: deque[Edge] = deque()
        self._gaps: list[tuple[str, str, str]] = []
        self._before: tuple[int, int] | None = None
        self._bell = threading.Lock()  # held while nobody rings; an Event does the same at several times the cost
        self._bell.acquire()
        self._asked = False
        self._stopping = self._left_behind = False
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="moe-energy-reader", daemon=True)

    def start(self) -> None:
        """Take the first reading here, the others in the thread."""
        self._on_reading(self._read(), 0.0)
        self._thread.start()

    def stop(self) -> bool:
        """Take the last reading and end the thread. False when it hangs in a driver call; it is then left behind."""
        self._stopping = True
        self._ring()
        if self._thread.is_alive():
            self._thread.join(STOP_WAIT_S)
        self._left_behind = self._thread.is_alive()
        return not self._left_behind

    def ask(self, edge: Edge | None = None) -> None:
        """Have a reading taken now, unless they cost too much already, or a window's edge found; returns at once."""
        if edge is None:
            self._asked = True
        else:
            self._edges.append(edge)
        self._ring()

    def _ring(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:  # it rings already
            return

    def cpu_time_s(self) -> float:
        """Processor time the thread has used so far."""
        if self._thread.ident is None or not self._thread.is_alive():
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def _run(self) -> None:
        due = time.monotonic() + self._interval_s
        while True:
            self._bell.acquire(timeout=max(0.0, due - time.monotonic()))
            stopping = self._stopping
            try:
                if self._edges:
                    self._burst()
                    self._spent_s = time.thread_time()  # who asks for a window pays for it
                began = time.monotonic()
                asked, self._asked = self._asked and began >= self._paid, False  # what is dear waits until it is due
                if stopping or asked or began >= due:
                    due = began + self._interval_s  # also when the round fails
                    reading, ended = self._read(last=stopping), time.monotonic()
                    if self._left_behind:  # the meter has ended, and may have begun again
                        return
                    due = self._due_after(began, ended, time.thread_time())
                    self._on_reading(reading, due - ended)
            except Exception as error:  # whatever a driver or a full machine does, the metered program goes on
                if not self._complained:
                    print(f"moe.energy: the reader met {type(error).__name__}: {error}; it goes on", file=sys.stderr)
                self._complained = True
            if stopping:
                return

    def _due_after(self, began: float, ended: float, spent_s: float) -> float:
        """When to read next, after a round that left the thread at `spent_s` of processor time in all.

        What a suspend or a hang missed stays missed.
        """
        cost_s, self._spent_s = spent_s - self._spent_s, spent_s
        due = max(began + self._interval_s, ended + self._interval_s / 2)
        if self._interval_s < PROMPT_S:
            return due
        self._paid = min(max(began, self._paid) + cost_s / SHARE, began + self._longest_s)
        return max(due, self._paid)

    def _sample(self) -> tuple[int, dict[str, int | None]]:
        """Read every source once and take the values into the tracks."""
        before_ns = boottime_ns()
        raw_mj: dict[str, int | None] = {}
        reasons: dict[str, str] = {}
        for source in self._sources:
            raw_mj.update(source.read())
            reasons.update(source.failures)
        at_ns = (before_ns + boottime_ns()) // 2
        for uuid, track in self.tracks.items():
            event = track.update(at_ns, raw_mj.get(uuid))
            if event is not None:
                reason = reasons.get(uuid, "") if event == "lost" else "the counter fell: driver reloaded"
                self._gaps.append((uuid, event, reason))
        return at_ns, raw_mj

    def _read(self, last: bool = False) -> Reading:
        at_ns, raw_mj = self._sample()
        gaps, self._gaps = self._gaps, []
        known_mj = [track.energy_mj for track in self.tracks.values() if track.energy_mj is not None]
        total_mj = sum(known_mj)
        if self._before is not None and at_ns > self._before[0]:
            self.power_w = (total_mj - self._before[1]) * 1e6 / (at_ns - self._before[0])
        self._before = (at_ns, total_mj) if known_mj else None
        reading = Reading(at_ns, raw_mj, gaps)
        if last or at_ns >= self._look_due_ns:
            self._look_due_ns = at_ns + round(CONDITIONS_S * 1e9)
            reading = self._look_around(reading)
        return reading

    def _look_around(self, reading: Reading) -> Reading:
        conditions: dict[str, dict[str, Any]] = {}
        for source in self._sources:
            if isinstance(source, Conditioned):
                conditions.update(source.conditions())
        node_mj = next(iter(self._node.read().values())) if self._node is not None else None
        return replace(reading, conditions=conditions, node_mj=node_mj)

    def _burst(self) -> None:
        """Sample until every waiting edge has its tick. Edges that arrive meanwhile share the samples."""
        waiting: list[Edge] = []
        while True:
            while self._edges:
                waiting.append(self._edges.popleft())
            at_ns, raw_mj = self._sample()
            tracks = self.tracks.items()
            energies_mj = {uuid: None if raw_mj.get(uuid) is None else track.energy_mj for uuid, track in tracks}
            covered_ns = {uuid: track.covered_ns for uuid, track in tracks}
            unseen_mj2 = {uuid: track.unseen_mj2 for uuid, track in tracks}
            sample = Sample(at_ns, energies_mj, covered_ns, unseen_mj2)
            waiting = [edge for edge in waiting if not edge.offer(sample)]
            if not waiting:
                return
            time.sleep(POLL_S)
