"""The next batch is read while the last one is trained on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["Prefetch"]

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Serves `read(n)`, and has `read(n + 1)` begun in a thread of its own by the time `take(n)` returns.

    One read is ahead, never more, and reads never overlap. `wait_s`: seconds that callers of `take` waited. What is
    taken never depends on timing. For a reader that only goes forwards, `discard` before it is set back.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[T]] | None = None
        self.wait_s = 0.0

    def take(self, number: int) -> T:
        """What `read(number)` returns; what it raises is raised here."""
        began = time.monotonic()
        try:
            if self._ahead is None or self._ahead[0] != number:
                self.discard()
                self._ahead = number, self._thread.submit(self._read, number)
            result = self._ahead[1].result()
        except BaseException:
            self._ahead = None  # a second try reads anew
            raise
        finally:
            self.wait_s += time.monotonic() - began
        self._ahead = number + 1, self._thread.submit(self._read, number + 1)
        return result

    def discard(self) -> None:
        """Forget what was read ahead, once its reading is over."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead[1], None
            if not ahead.cancel():
                ahead.exception()

    def close(self) -> None:
        """End the thread."""
        self.discard()
        self._thread.shutdown()
