"""A living run as it goes: only what was appended to metrics.jsonl since the last look is read."""

import json
from collections import deque
from pathlib import Path
from typing import Any

from moe.energy.locks import is_locked
from moe.rundir import RunDir

__all__ = ["Follower"]

_WINDOW = 100  # rows the pace is taken from: evaluations and checkpoints among them count


class Follower:
    """Follows one run. `values` holds the last value of each metric; `look` brings it up to date."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._offset = 0
        self._pace: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # (step, boottime_ns) of this segment
        self.values: dict[str, Any] = {}
        self.max_steps = int(run.read_json(run.config)["train"]["max_steps"])

    @property
    def step(self) -> int:
        return self.values.get("train/step", 0)

    @property
    def living(self) -> bool:
        """Whether a process trains the run."""
        return is_locked(self._run.ledger())

    @property
    def remaining_s(self) -> float | None:
        """Seconds to train.max_steps at the pace of the last rows; None before there are two."""
        if len(self._pace) < 2 or self._pace[-1][0] == self._pace[0][0]:
            return None
        (first_step, first_ns), (last_step, last_ns) = self._pace[0], self._pace[-1]
        return (self.max_steps - last_step) * (last_ns - first_ns) / 1e9 / (last_step - first_step)

    def look(self) -> bool:
        """Read the whole lines written since the last look; whether a training step or an evaluation was among them."""
        new = False
        for line in self._new_lines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            if "resumed_step" in row:  # a new process; work after that step is done again
                self._pace.clear()
                self.max_steps = int(self._run.read_json(self._run.config)["train"]["max_steps"])
            else:
                new = True
            if "train/loss" in row:
                self._pace.append((row["train/step"], row["boottime_ns"]))
            self.values |= row
        return new

    def _new_lines(self) -> list[bytes]:
        path: Path = self._run.metrics
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()
