"""Saving while training goes on: one background writer, whose failures reach the trainer."""

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from moe.checkpoint.files import prune, write_checkpoint
from moe.checkpoint.snapshot import Snapshot
from moe.errors import CheckpointError

__all__ = ["Saver"]


class Take(Protocol):
    """Makes a snapshot; with `copy` training may go on while it is written."""

    def __call__(self, *, copy: bool) -> Snapshot | None: ...


class Saver:
    """Writes snapshots into a folder, one at a time, and prunes older ones once the new one is whole.

    Args:
        keep: newest checkpoints kept.
        keep_every_steps: checkpoints of steps divisible by this are kept for ever.
        background: write in a thread; else `save` returns when the checkpoint is on disk.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every_steps: int | None, background: bool) -> None:
        self._folder, self._keep, self._keep_every_steps = folder, keep, keep_every_steps
        self._background = background
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.stall_s = 0.0  # how long the last save kept the caller

    def save(self, step: int, take: Take) -> None:
        """Take a snapshot and write it; waits for the write before, so that at most one copy is held.

        `take` gives None on ranks that have nothing to write. When the write before failed, stderr says so and this one
        is waited for: CheckpointError when it fails too. Earlier checkpoints are whole then.
        """
        began = time.monotonic()
        background = self._background
        try:
            self.wait()
        except CheckpointError as error:  # the disk may have room again; if not, this is the place to know it
            print(f"{error}; trying again at step {step}", file=sys.stderr, flush=True)
            background = False
        snapshot = take(copy=background)
        if snapshot is not None and background:
            self._pending = self._writer.submit(self._write, step, snapshot)
        elif snapshot is not None:
            self._write(step, snapshot)
        self.stall_s = time.monotonic() - began

    def wait(self) -> None:
        """Until what was saved is on disk. Raises CheckpointError when it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a write in hand end; its failure, if any, was not asked for and is left to the next start's manifest."""
        self._writer.shutdown(wait=True)

    def _write(self, step: int, snapshot: Snapshot) -> None:
        write_checkpoint(self._folder, step, snapshot)
        prune(self._folder, self._keep, self._keep_every_steps)
