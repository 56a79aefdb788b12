"""EnergyMeter: reads a machine's energy while a program runs, and writes it down so that a kill loses seconds."""

import atexit
import functools
import os
import socket
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from moe.energy.clock import boot_id, boottime_ns, device_time_start_ns
from moe.energy.file_fold import NS_PER_HOUR, FileFold, device_hours_of
from moe.energy.journal import Journal
from moe.energy.ledger import LedgerWriter, Record
from moe.energy.locks import Lock, lock_device, lock_ledger
from moe.energy.phases import PhaseClock
from moe.energy.reader import Reader
from moe.energy.sources import Source, is_measured, node_counter, select_sources
from moe.energy.sources.base import ESTIMATES, Device
from moe.energy.sources.integral import MAX_STEP_S, READ_EVERY_S
from moe.energy.totals import LedgerPosition, Totals
from moe.energy.window import Window
from moe.errors import ConfigError, LedgerError, SensorError

__all__ = ["METERED_BY", "EnergyMeter"]

P = ParamSpec("P")
T = TypeVar("T")

METERED_BY = "MOE_LEDGER"  # in the environment of a program that `moe energy run` meters: the ledger that bills it

_startup_claimed = False  # the time before the first meter of a process is counted once
_running_meters: "weakref.WeakSet[EnergyMeter]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child has no reader thread, and perhaps a lock held for ever: its copies of meters do nothing."""
    for meter in _running_meters:
        meter._running = False


os.register_at_fork(after_in_child=_let_go_in_child)


class EnergyMeter:
    """Meters this process's devices from `start` to `stop`, over a with block, or, as a decorator, over each call.

    ledger            file to append to (a new segment of it); None keeps everything in memory
    devices           GPU UUIDs; None or [] is this host's processors (RAPL, else an estimate)
    declared_power_w  watts per device: replaces every sensor, and the source says `declared`
    interval_s        between readings, and from a second on longer where they cost too much (`Reader`)
    flush_s           between writes to the ledger: what a kill or a power cut may cost
    resumed_step, resumed_tokens  where the lineage stands as this segment begins
    sources           sensors of one's own, instead of `devices`
    node              a counter of the whole node, kept beside GPUs and never added to them; by default the one there is

    `start` raises SensorError when a named GPU cannot be read, ConfigError when power is to be integrated over
    intervals above a second, and LedgerError when the ledger is damaged or has a living writer. After that no method
    raises for a sensor or a disk: failures become gaps in the ledger and one line on stderr. A second meter on the same
    device only warns, and the segment line records it.

    Under `moe energy run` (MOE_LEDGER set) the outer ledger already bills this process. This meter then still reads and
    writes its own ledger, which `moe compare` needs; its segment line says `metered_by`, and `moe energy total` counts
    what both ledgers hold once, as the outer one read it, for the purposes that this one tells.
    """

    def __init__(
        self,
        ledger: Path | str | None = None,
        devices: Sequence[str] | None = None,
        declared_power_w: float | None = None,
        interval_s: float = 1.0,
        flush_s: float = 5.0,
        resumed_step: int = 0,
        resumed_tokens: int = 0,
        sources: Sequence[Source] | None = None,
        node: Source | None = None,
    ) -> None:
        if not interval_s >= 0.01:
            raise ConfigError(f"interval_s={interval_s} would load the driver with reads: give at least 0.01")
        if not flush_s >= interval_s:
            raise ConfigError(f"flush_s={flush_s} is below interval_s={interval_s}: give at least the interval")
        self.path = None if ledger is None else Path(ledger)
        self._wanted = (devices, declared_power_w)
        self._given_sources = sources
        self._node = node
        self._sources: Sequence[Source] = ()
        self._interval_s, self._flush_s = interval_s, flush_s
        self._resumed = (resumed_step, resumed_tokens)
        self._locks: list[Lock] = []
        self._base_mj, self._base_hours, self._has_base = 0, 0.0, False
        self._names = ("", "", True)  # source, scope and measured of the whole ledger
        self._prior: FileFold | None = None
        self._running = False
        self._start_ns = self._ended_ns = 0
        self._writer = LedgerWriter(None)
        self._reader = Reader((), interval_s, interval_s, lambda reading, pause_s: None)

    def start(self) -> "EnergyMeter":
        """Open sensors and ledger, write the `segment` line and the first reading, start the reader thread."""
        if self._running:
            return self
        self._running = True
        try:
            self._open()
        except BaseException:
            self._running = False
            self._release()
            raise
        _running_meters.add(self)
        atexit.register(self.stop)
        return self

    def _open(self) -> None:
        global _startup_claimed
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LedgerError(f"folder of ledger {self.path} cannot be made ({error.strerror})") from None
            self._locks.append(lock_ledger(self.path))
        self._sources = select_sources(*self._wanted) if self._given_sources is None else self._given_sources
        self._check_interval()
        self._prior = prior = FileFold(self.path)
        self._writer = LedgerWriter(self.path, on_record=self._see)
        if self._node is None and any(device.kind == "gpu" for source in self._sources for device in source.devices):
            self._node = node_counter()
        self._start_ns = boottime_ns()
        if self.path is not None and not _startup_claimed:
            self._start_ns, _startup_claimed = self._device_time_start_ns(prior), True
        self._phases = PhaseClock(self._start_ns, long_s=self._interval_s)
        self._journal = Journal(self._writer, self._phases, self._interval_s, self._flush_s)
        # a reading is written in time, and power is read before it says nothing of the time between
        longest_s = max(self._interval_s, min(self._flush_s, MAX_STEP_S) - 2 * self._interval_s)
        self._reader = Reader(self._sources, self._interval_s, longest_s, self._journal.add, self._node)
        self._write_header()
        self._phases.cut()
        self._phases.enter("idle")
        self._reader.start()
        self._journal.write()
        self._prior = None
        self._add_up_prior(prior)

    def _check_interval(self) -> None:
        integrated = [d.uuid for source in self._sources for d in source.devices if d.source == "integrated"]
        if integrated and self._interval_s > READ_EVERY_S:
            raise ConfigError(
                f"energy.interval_s={self._interval_s:g} is too long for {integrated[0]}, which tells power and no "
                f"energy: give at most {READ_EVERY_S:g}"
            )

    def _device_time_start_ns(self, prior: FileFold) -> int:
        """When this segment's device time began: never before the end of the segment before, which billed it."""
        start_ns = device_time_start_ns(new_ledger=not prior.segments)
        if not prior.segments or prior.segments[-1].header["boot_id"] != boot_id() or not boot_id():
            return start_ns
        return min(max(start_ns, prior.segments[-1].last_ns), boottime_ns())

    def _write_header(self) -> None:
        extra: dict[str, Any] = {}
        metered_by = os.environ.get(METERED_BY)
        if metered_by:
            extra["metered_by"] = metered_by
        second = self._claim_devices()
        if second and not metered_by:
            extra["second_reader"] = second
            print(f"moe.energy: another meter reads {', '.join(second)} too: do not add the two up", file=sys.stderr)
        if self._node is not None:
            extra["node_source"] = self._node.devices[0].source
        if self._writer.torn_bytes:
            extra["torn_bytes"] = self._writer.torn_bytes
            print(
                f"moe.energy: {self.path} ended in a torn line of {self._writer.torn_bytes} bytes, cut off",
                file=sys.stderr,
            )
        self._writer.append(
            "segment",
            boot_id=boot_id(),
            host=socket.gethostname(),
            pid=os.getpid(),
            started_boottime_ns=self._start_ns,
            interval_s=self._interval_s,
            flush_s=self._flush_s,
            resumed_step=self._resumed[0],
            resumed_tokens=self._resumed[1],
            devices=[device.to_json() for device in self._reader.devices],
            **extra,
        )

    def _claim_devices(self) -> list[str]:
        second = []
        for device in self._reader.devices:
            if device.source in ESTIMATES:
                continue
            lock = lock_device(device.uuid)
            if lock is None:
                second.append(device.uuid)
            else:
                self._locks.append(lock)
        return second

    def stop(self, reason: str = "stopped") -> None:
        """Take the last reading, write the `end` line, fsync. A second call, or one in a forked child, does nothing."""
        if not self._running:
            return
        self._running = False
        _running_meters.discard(self)
        atexit.unregister(self.stop)
        answered = self._reader.stop()
        self._phases.cut()
        self._ended_ns = boottime_ns()
        end = {"reason": reason if answered else f"{reason}; the last read hung"}
        self._journal.write([("end", self._ended_ns, end)])
        self._writer.close()
        self._release(close_sources=answered)

    def _release(self, close_sources: bool = True) -> None:
        for source in self._sources if close_sources else ():  # one that hangs in the driver would hang here too
            source.close()
        for lock in self._locks:
            lock.release()
        self._locks = []

    def __enter__(self) -> "EnergyMeter":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop("stopped" if kind is None else kind.__name__)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """As a decorator: each call of `function` is one segment; one within a metered call belongs to that."""

        @functools.wraps(function)
        def metered(*args: P.args, **kwargs: P.kwargs) -> T:
            if self._running:
                return function(*args, **kwargs)
            with self:
                return function(*args, **kwargs)

        return metered

    def phase(self, name: str) -> None:
        """The program is now in this phase (data, forward_backward, optimizer, evaluation, checkpoint, idle)."""
        if self._running and self._phases.enter(name):
            self._reader.ask()  # a reading at the boundary keeps the two phases' power apart

    def progress(self, step: int, tokens: int | None = None) -> None:
        """Optimizer steps and tokens of the lineage done so far."""
        if self._running:
            self._phases.step, self._phases.tokens = step, tokens

    def flush(self, step: int | None = None, tokens: int | None = None) -> LedgerPosition:
        """Cut a mark exactly here, fsync, and return the ledger's position, to be stored with a checkpoint."""
        if step is not None:
            self.progress(step, tokens)
        if self._running:
            self._phases.cut()
            self._journal.write()
        return {"segment": self.segment, "seq": self._writer.last_seq}

    def window(self, name: str) -> Window:
        """A with block whose energy is found to within the counter's tick; see `Window`."""
        if not self._running:
            raise SensorError(f"window {name!r} needs a running meter: call start() or use it as a context manager")
        return Window(name, self._reader.devices, self._reader.ask)

    @property
    def segment(self) -> int:
        """Index of this segment in the ledger, earlier processes' segments counted; known once started."""
        return self._writer.segment

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices metered, once started."""
        return self._reader.devices

    @property
    def reader_cpu_s(self) -> float:
        """Processor time the running meter's thread has used so far: with the calls' own, what metering costs."""
        return self._reader.cpu_time_s()

    def snapshot(self) -> Totals:
        """The whole ledger's totals up to the last reading; a few microseconds."""
        energy_mj, known = self._base_mj, self._has_base
        for track in self._reader.tracks.values():
            if track.energy_mj is not None:
                energy_mj, known = energy_mj + track.energy_mj, True
        now_ns = boottime_ns() if self._running else self._ended_ns
        source, scope, measured = self._names
        return Totals(
            energy_j=energy_mj / 1000 if known else None,
            device_hours=self._base_hours + len(self.devices) * (now_ns - self._start_ns) / NS_PER_HOUR,
            power_w=self._reader.power_w,
            source=source,
            scope=scope,
            measured=measured,
        )

    def _see(self, record: Record) -> None:
        """Fold earlier segments, and this one up to its first reading, which tells what was lost between them."""
        if self._prior is not None:
            self._prior.feed(record)

    def _add_up_prior(self, prior: FileFold) -> None:
        self._base_mj = prior.energy_mj
        self._has_base = prior.has_reading
        earlier = prior.segments[:-1]
        self._base_hours = sum(device_hours_of(segment) for segment in earlier)
        devices = [line.device for segment in prior.segments for line in segment.lines.values()]
        self._names = (
            "+".join(sorted({device["source"] for device in devices})),
            "+".join(sorted({device["scope"] for device in devices})),
            all(is_measured(device["source"]) for device in devices),
        )
        lost_j = sum(prior.unattributed_mj(len(prior.segments) - 1).values()) / 1000
        if earlier and earlier[-1].end_reason is None and not lost_j:
            self._writer.append("gap", device=None, reason="reset", detail="the segment before was lost with its end")
