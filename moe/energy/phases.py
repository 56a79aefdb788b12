"""Where the process's time goes: data, forward_backward, optimizer, evaluation, checkpoint, idle.

The main thread says which phase it is in (about a microsecond a call); times add up in memory and are cut into marks,
one with each reading and one exactly at every boundary that matters. No step writes a line of its own.
"""

import threading
from collections import deque
from dataclasses import dataclass

from moe.energy.clock import boottime_ns

__all__ = ["LOST", "PHASE_FOR", "PURPOSE_OF", "STARTUP", "STEP_PHASES", "Mark", "PhaseClock"]

STARTUP = "startup"  # from the start of the process to the start of the meter
STEP_PHASES = frozenset({"data", "forward_backward", "optimizer"})  # the time of optimizer steps
LOST = "lost_to_restarts"  # what steps are for that a later segment did again
PHASE_FOR = {  # what a program metered from outside is for -> the phase it is
    "training": "training",
    "data": "data_preparation",
    "evaluation": "evaluation",
    "other": "command",
}
PURPOSE_OF = {  # phase -> what it is for, in a programme of runs; whatever else a program calls a phase is its own
    "forward_backward": "training",
    "optimizer": "training",
    "training": "training",
    "data": "data",
    "data_preparation": "data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "idle": "startup_and_idle",
    STARTUP: "startup_and_idle",
}


@dataclass(frozen=True)
class Mark:
    """Time per phase since the mark before, and how far the lineage has come (None: never told)."""

    boottime_ns: int
    phase: str
    step: int | None
    tokens: int | None
    phase_s: dict[str, float]


class PhaseClock:
    """Adds up phase times from `start_ns` (boottime) on.

    The lock is reentrant: a signal handler may enter a phase while the interrupted code holds it.
    """

    def __init__(self, start_ns: int, long_s: float) -> None:
        self.step: int | None = None
        self.tokens: int | None = None
        self._long_ns = int(long_s * 1e9)
        self._phase = STARTUP
        self._since_ns = self._entered_ns = start_ns
        self._times_ns: dict[str, int] = {}
        self._marks: deque[Mark] = deque()
        self._lock = threading.RLock()

    def enter(self, phase: str) -> bool:
        """The process is now in `phase`. True when the phase that ended was long enough to deserve its own boundary."""
        with self._lock:
            now = boottime_ns()
            was_long = now - self._entered_ns >= self._long_ns and phase != self._phase
            self._settle(now)
            if was_long:
                self._queue_mark(now)
            self._phase = phase
            self._entered_ns = now
            return was_long

    def cut(self) -> None:
        """Queue a mark that ends now."""
        with self._lock:
            now = boottime_ns()
            self._settle(now)
            self._queue_mark(now)

    def take(self) -> Mark | None:
        """The oldest queued mark."""
        return self._marks.popleft() if self._marks else None

    def _settle(self, now: int) -> None:
        self._times_ns[self._phase] = self._times_ns.get(self._phase, 0) + now - self._since_ns
        self._since_ns = now

    def _queue_mark(self, now: int) -> None:
        phase_s = {name: spent_ns / 1e9 for name, spent_ns in self._times_ns.items() if spent_ns}
        self._marks.append(Mark(now, self._phase, self.step, self.tokens, phase_s))
        self._times_ns = {}
