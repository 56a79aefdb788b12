"""SIGTERM and SIGINT become a request to stop after the step in hand, with a checkpoint."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

__all__ = ["StopRequest", "Stopped", "interruptible", "leave"]

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_LEFT = "interruptible"  # name of the threads


class Stopped(BaseException):
    """A signal came where there is nothing to finish. Like KeyboardInterrupt it is no error, so nothing mistakes it."""


class StopRequest:
    """Holds the signal that asked for the stop, or None. A second SIGINT interrupts at once, as Python does.

    A one-process `accelerate launch` dies of SIGTERM alone and leaves its child training, so under a launcher the
    kernel is asked to send SIGTERM to this process when its parent dies.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
            _die_with_parent()

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises Stopped: what blocks, or takes minutes, is left there; see `interruptible`."""
        self._at_once = True
        try:
            if self:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._at_once:
            raise Stopped


def interruptible(work: Callable[[], T]) -> T:
    """What `work` returns, or raises, in a thread of its own, which is left to itself when a signal raises here.

    Python handles a signal once the main thread is back from what it called; a tokenizer's Rust may take minutes.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=_LEFT, daemon=True).start()
    while not wait([done], timeout=1.0).done:  # a signal right before a wait is lost until the wait ends
        pass
    return done.result()


def leave(code: int) -> NoReturn:
    """End the process. With a thread of `interruptible` still at work it ends at once, after flushing what was printed:
    Python's own end stops such a thread in whatever extension it is in, which aborts the process."""
    if any(thread.name == _LEFT for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _die_with_parent() -> None:
    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux alone has it; elsewhere the launcher must pass signals on
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
