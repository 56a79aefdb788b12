"""Freed memory stays with the process while a processor trains."""

import ctypes

__all__ = ["keep_freed"]

# mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed() -> None:
    """Have glibc's malloc give no memory back to the system; without effect where there is another malloc.

    A step frees what it allocated, and the next one wants as much again. Left to itself malloc unmaps every large
    tensor, and the system then hands out its pages anew one by one, each cleared first: 15 % of a step on two
    cores. The process keeps as much as it has once needed, which the next step needs again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks lie in the heap too
        mallopt(_M_TRIM_THRESHOLD, -1)  # the heap never shrinks
