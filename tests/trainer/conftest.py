"""Launching the tiny recipe as people do: through `accelerate launch`, in a folder of its own."""

import json
import os
import random
import subprocess
import sys
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
