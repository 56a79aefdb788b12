"""Launch a kernel on the device of its tensors, or only compile it, many at once.

The host reads nothing that a kernel computes, so what an op launches is known without running it: within
`compile_ahead` ops run on memory that nobody writes, and leave their kernels compiled. The compiler lets go of Python's
lock for most of its time, and ptxas is a process of its own: two threads on two cores took 0.55 of one thread's time.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import torch
from torch import Tensor

from ._triton import triton

__all__ = ["compile_ahead", "launch"]

_MOST_THREADS = 16  # a self-check has some ninety kernels, about half a second each

# Triton's mode of the thread that compiles ahead: others launch meanwhile
_ahead: ContextVar[Any] = ContextVar("ahead", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch on the device of the first argument, with memory for the kernel's descriptors.

    Triton asks a context variable for that memory. Autograd's threads have none set, and a caller's own is left alone:
    the launch runs in a copy of the context.
    """
    if args[0].is_cuda:
        run = _launch if _ahead.get() is None else _compile
        # Triton launches on the current device, not on its arguments'
        with torch.cuda.device(args[0].device):
            copy_context().run(run, kernel, grid, args, options)
    else:
        kernel[grid](*args, **options)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    triton.set_allocator(_allocate)
    kernel[grid](*args, **options)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Bytes on the current device; torch aligns to 512 and gives them again only to later work of the stream."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _compile(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    """Have it compiled by a thread of the pool, unless an equal one is already.

    What this thread does itself is what threads must not do at once: Triton makes its driver at the first use without
    a lock, by a C compiler, and of two drivers one takes no arguments of the other's types.
    """
    _ahead.get().__enter__()  # until the copy of the context is gone: leaving it would wait for the pool
    kernel.warmup(*args, grid=grid, **options)


def _threads() -> int:
    """This process's share of the processors it may use: the ranks of a node all compile at once."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_THREADS, max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Within it this thread launches nothing on a GPU; what it would launch there is compiled by several threads.

    It ends when all is compiled. Raises what the compiler raises. Backward passes must be of this thread too
    (`torch.autograd.set_multithreading_enabled`).
    """
    with ThreadPoolExecutor(_threads()) as pool:
        mode = triton.AsyncCompileMode(pool)
        token = _ahead.set(mode)
        try:
            yield
        finally:
            _ahead.reset(token)
    for compiled in mode.future_kernels.values():
        compiled.result()
