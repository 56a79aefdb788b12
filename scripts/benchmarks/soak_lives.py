"""A training that is killed at moments a seed draws, and started again each time until it ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe.energy import fold_ledgers

if TYPE_CHECKING:
    from fake_node import FakeGpu

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests" / "trainer" / "soaked_recipe.py"
KINDS = ("checkpoint", "power cut", "rare", "step", "start")
LAST_STEPS = 100
CHECKPOINT_EVERY = 20  # steps; where they are rare, the end's alone
PACE_S = 0.25  # of the steps between rare checkpoints: fewer of them than LAST_STEPS in a life
RARE_S = (10.0, 13.0)
START_S = 4.5  # of which three and a half load torch
OFF_S = (2.0, 4.0)  # with the start that follows, longer than a flush interval
PATIENCE_S = 120.0


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@contextmanager
def _not_left_alone(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Whoever interrupts the soak ends the training too."""
    try:
        yield
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@dataclass
class Life:
    """One process, as seen from outside. It began between `forked_ns` and `running_ns`, and was alive at `alive_ns`."""

    kind: str
    pid: int
    forked_ns: int
    running_ns: int
    alive_ns: int = 0
    gone_ns: int = 0
    cut_bytes: int = 0


class Soak:
    """Trains the runs `whole` and `killed` in `folder`; `environment` makes NVML the fake one."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], gpu: "FakeGpu", *, kills: int, seed: int, steps_a_kill: int
    ) -> None:
        self.folder, self.gpu, self.kills = folder, gpu, kills
        self.steps = steps_a_kill * kills + LAST_STEPS
        self.lives: list[Life] = []
        self.folded_mj: list[int] = []  # the ledger's total as each kill left it
        self._chance = random.Random(seed)
        self._fsynced = folder / "fsynced"
        self._fsynced.touch()
        self._environment = {
            **environment,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "HELD_GPU": gpu.uuid,
            "FSYNCED": str(self._fsynced),
        }
        chance = random.Random(0)
        words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
        (folder / "text").write_text(" ".join(chance.choices(words, k=9000)), encoding="utf-8")

    def run(self) -> None:
        """All lives of both runs."""
        self._end(*self._begin("whole", "end"))
        targets = sorted(self._chance.sample(range(1, self.steps - LAST_STEPS), self.kills))
        for number, target in enumerate(targets):
            kind = KINDS[number % len(KINDS)]
            life, process = self._begin("killed", kind, rare=kind == "rare")
            self._kill(life, process, target)
            self.lives.append(life)
            if self.ledger().is_file():
                self.folded_mj.append(fold_ledgers([self.ledger()]).total.energy_mj)
            print(json.dumps(vars(life)), file=sys.stderr, flush=True)
        life, process = self._begin("killed", "end")
        self._end(life, process)
        self.lives.append(life)

    def ledger(self) -> Path:
        return self.path("killed") / "ledger.jsonl"

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _begin(self, name: str, kind: str, rare: bool = False) -> tuple[Life, "subprocess.Popen[bytes]"]:
        words = {
            "run.name": name,
            "train.max_steps": self.steps,
            "train.checkpoint_every_steps": self.steps if rare else CHECKPOINT_EVERY,
            "train.eval_every_tokens": 5120,
        }
        command = [sys.executable, str(RECIPE), *(f"{name}={value}" for name, value in words.items())]
        environment = {**self._environment, "PACE_S": str(PACE_S if rare else 0)}
        forked_ns = now_ns()
        with (self.folder / f"{name}.stderr").open("ab") as said:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stderr=said, start_new_session=True)
        return Life(kind, process.pid, forked_ns, now_ns()), process

    def _end(self, life: Life, process: "subprocess.Popen[bytes]") -> None:
        life.alive_ns = now_ns()
        with _not_left_alone(process):
            code = process.wait()
        life.gone_ns = now_ns()
        if code:
            raise RuntimeError(f"the training ended with exit code {code}: {self._said()}")

    def _kill(self, life: Life, process: "subprocess.Popen[bytes]", target: int) -> None:
        with _not_left_alone(process):
            self._wait_for_its_moment(life, process, target)
        life.alive_ns = now_ns()
        if process.poll() is not None:
            raise RuntimeError(f"the training was over before its kill at step {target}: {self._said()}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        life.gone_ns = now_ns()
        if life.kind == "power cut":
            life.cut_bytes = self._cut("ledger.jsonl") + self._cut("metrics.jsonl")
            time.sleep(self._chance.uniform(*OFF_S))

    def _wait_for_its_moment(self, life: Life, process: "subprocess.Popen[bytes]", target: int) -> None:
        if life.kind == "start":
            time.sleep(self._chance.uniform(0, START_S))
        elif life.kind == "rare":
            self._wait(process, lambda: self._step(life) >= 0)
            time.sleep(self._chance.uniform(*RARE_S))
        else:
            self._wait(process, lambda: self._step(life) >= target)
            if life.kind == "checkpoint":
                checkpoints = self.path("killed") / "checkpoints"
                self._wait(process, lambda: any(checkpoints.glob(f".step_*.{life.pid}")))
                time.sleep(self._chance.uniform(0, 0.01))
            else:
                time.sleep(self._chance.uniform(0, 0.5))

    def _said(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.stderr"))[-4000:]

    def _wait(self, process: "subprocess.Popen[bytes]", holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)

    def _step(self, life: Life) -> int:
        """The last step this process wrote a row of; -1 before its first."""
        try:
            with (self.path("killed") / "metrics.jsonl").open("rb") as file:
                file.seek(-min(4096, file.seek(0, os.SEEK_END)), os.SEEK_END)
                row = json.loads(file.read()[:-1].rpartition(b"\n")[2])
        except (FileNotFoundError, ValueError):  # half a row, for a moment
            return -1
        return row["train/step"] if row["boottime_ns"] > life.forked_ns else -1

    def _cut(self, name: str) -> int:
        """Take away what a power cut may: any number of the bytes behind the last fsync. Returns how many."""
        path = self.path("killed") / name
        synced = [line.split(" ", 1) for line in self._fsynced.read_text().splitlines()]
        least = max((int(size) for size, where in synced if Path(where) == path.resolve()), default=0)
        size = path.stat().st_size
        kept = self._chance.randint(least, size)
        os.truncate(path, kept)
        return size - kept
