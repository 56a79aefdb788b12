"""SIGTERM and SIGINT become a request to stop after the step in hand, with a checkpoint."""

import contextlib
import ctypes
import os
import signal
from types import FrameType

__all__ = ["StopRequest"]

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Holds the signal that asked for the stop, or None. A second SIGINT interrupts at once, as Python does.

    A one-process `accelerate launch` dies of SIGTERM alone and leaves its child training, so under a launcher the
    kernel is asked to send SIGTERM to this process when its parent dies.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
            _die_with_parent()

    def __bool__(self) -> bool:
        return self.signal is not None

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def _die_with_parent() -> None:
    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux alone has it; elsewhere the launcher must pass signals on
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
