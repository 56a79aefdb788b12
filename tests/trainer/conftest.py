"""Launching the tiny recipe as people do: through `accelerate launch`, in a folder of its own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).with_name("tiny_recipe.py")
ROOT = RECIPE.parents[2]


class Place:
    """A folder with a text to train on and the runs made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        chance = random.Random(0)
        words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
        (folder / "text").write_text(" ".join(chance.choices(words, k=9000)), encoding="utf-8")

    def command(self, *words: str, ranks: int = 1, recipe: str = RECIPE.name) -> tuple[list[str], dict[str, str]]:
        """What to execute, and in which environment, for `ranks` gloo processes."""
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes"]
        launch += [str(ranks), "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--multi_gpu", "--main_process_port", "0"] if ranks > 1 else []
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        return [*launch, str(RECIPE.with_name(recipe)), *words], environment | (
            {"ACCELERATE_USE_CPU": "true"} if ranks > 1 else {}
        )

    def launch(
        self, *words: str, ranks: int = 1, recipe: str = RECIPE.name, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; the caller looks at the exit code."""
        command, base = self.command(*words, ranks=ranks, recipe=recipe)
        return subprocess.run(
            command,
            env={**base, **(environment or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def python(
        self, *words: str, recipe: str = RECIPE.name, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The recipe without a launcher."""
        _, base = self.command()
        return subprocess.run(
            [sys.executable, str(RECIPE.with_name(recipe)), *words],
            env={**base, **(environment or {})}, cwd=self.folder,
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip

    def start(self, name: str, *words: str, ranks: int = 1) -> subprocess.Popen[str]:
        """Launch the run `name`, to be waited for or stopped."""
        return self.popen(*self.command(f"run.name={name}", *words, ranks=ranks))

    def popen(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """A process group of its own, that says where it hangs when it is ended by SIGABRT."""
        return subprocess.Popen(
            command, env={**environment, "PYTHONFAULTHANDLER": "1"}, cwd=self.folder, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen[str]) -> None:
        """Until the run's metrics show `step`; of step 0, until there are metrics."""
        deadline = time.monotonic() + 120
        while not (self.run(name) / "metrics.jsonl").is_file() or max(self.losses(name), default=0) < step:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_until_gone(self, name: str, process: subprocess.Popen[str], seconds: float) -> None:
        """Until no process trains the run, whatever became of its launcher."""
        deadline = time.monotonic() + seconds
        while pids := self._trainer_pids(name):
            if time.monotonic() > deadline:
                for pid in pids:
                    os.kill(pid, signal.SIGABRT)  # faulthandler writes where it hangs to the captured stderr
                pytest.fail(f"the trainer outlived its stop: {process.communicate()[1]}")
            time.sleep(0.05)

    def _trainer_pids(self, name: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                here = os.readlink(entry / "cwd") == str(self.folder)
            except OSError:
                continue
            if here and f"run.name={name}".encode() in words and b"accelerate.commands.launch" not in words:
                found.append(int(entry.name))
        return found

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All metrics rows as written, lost work included."""
        lines = (self.run(name) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def losses(self, name: str) -> dict[int, float]:
        """Training loss by step; where a step was done twice, the last time."""
        return {row["train/step"]: row["train/loss"] for row in self.rows(name) if "train/loss" in row}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Place:
    """The uninterrupted run `whole`, which other runs are compared with."""
    done = place.launch("run.name=whole")
    assert done.returncode == 0, done.stderr
    return place
