"""What a running meter has yet to write: gaps, readings and marks, put into the ledger in the order of time."""

import threading
from collections.abc import Sequence
from typing import Any

from moe.energy.clock import boottime_ns, utc_now
from moe.energy.ledger import LedgerWriter
from moe.energy.phases import PhaseClock
from moe.energy.reader import Reading

__all__ = ["Journal"]

Line = tuple[str, int | None, dict[str, Any]]  # kind, boottime_ns or None for now, fields


class Journal:
    """Keeps lines in memory and writes them before the oldest is `flush_s` old.

    The reader adds to it and the program has it written, each in its own thread.
    """

    def __init__(self, writer: LedgerWriter, phases: PhaseClock, interval_s: float, flush_s: float) -> None:
        self._writer, self._phases = writer, phases
        self._interval_s, self._flush_s = interval_s, flush_s
        self._lines: list[Line] = []
        self._lock = threading.Lock()
        self._synced_ns = boottime_ns()

    def add(self, reading: Reading, pause_s: float) -> None:
        """Keep what the reader found (called in its thread): gaps, readings, and the time since the last mark.

        Written when after the next reading, `pause_s` later and up to an interval long, it would be more than `flush_s`
        old: a thread that wakes once a second finds every call cold, and a hash or a write costs several times what it
        does in a row of them.
        """
        utc = utc_now()
        lines: list[Line] = [
            ("gap", reading.at_ns, {"utc": utc, "device": uuid, "reason": event, "detail": detail})
            for uuid, event, detail in reading.gaps
        ]
        node = {} if reading.node_mj is None else {"node_energy_mj": reading.node_mj}
        for uuid, raw_mj in reading.raw_mj.items():
            if raw_mj is not None:
                conditions = reading.conditions.get(uuid, {})
                fields = {"utc": utc, "device": uuid, "energy_mj": raw_mj, **conditions, **node}
                lines.append(("reading", reading.at_ns, fields))
                node = {}  # on the first line of a round
        self._phases.cut()
        with self._lock:
            self._lines += lines
            self._take_marks(utc)
        if (boottime_ns() - self._synced_ns) / 1e9 + pause_s + self._interval_s >= self._flush_s:
            self.write()

    def _take_marks(self, utc: str) -> None:
        """Put the marks that wait behind the lines (with the lock held): their order is that of time."""
        while (mark := self._phases.take()) is not None:
            fields = {
                "utc": utc,
                "phase": mark.phase,
                "step": mark.step,
                "tokens": mark.tokens,
                "phase_s": mark.phase_s,
            }
            self._lines.append(("mark", mark.boottime_ns, fields))

    def write(self, last: Sequence[Line] = ()) -> None:
        """Write everything that waits, then `last`, and fsync. The reader and the program both do."""
        self._synced_ns = boottime_ns()
        with self._lock:
            self._take_marks(utc_now())
            lines, self._lines = [*self._lines, *last], []
            if lines:
                self._writer.append_all(lines)
        self._writer.sync()
