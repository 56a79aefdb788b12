"""Who takes part in a race on a CPU, each in a process of its own.

In one process they would share malloc's heap and oneDNN's cache of some thousand compiled products: a peer with other
numbers of rows in every step throws the products of all others out, who then pay for its habits. Alone, each runs as it
does at its user's. Processes wait while others run.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

__all__ = ["Contestant"]


class Contestant:
    """`build(*setup)` made in a process with `threads` threads; calling it calls the result there and waits for it."""

    def __init__(self, threads: int, build: Callable[..., Callable[..., Any]], *setup: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["moe", "transformers.modeling_utils", build.__module__])  # once for all
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, build, setup), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *words: Any) -> Any:
        """Raises RuntimeError with the traceback of what went wrong there."""
        try:
            self._pipe.send(words)
            failed, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"a contestant ended with exit code {self._process.exitcode}: out of memory?") from None
        if failed:
            raise RuntimeError(answer)
        return answer

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.join()


def _serve(pipe: Any, threads: int, build: Callable[..., Callable[..., Any]], setup: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    run: Callable[..., Any] | None = None
    while True:
        words = pipe.recv()
        try:
            run = run or build(*setup)
            pipe.send((False, run(*words)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
