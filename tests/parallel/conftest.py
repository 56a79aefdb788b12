"""Launching recipes through recipes/launch/*.yaml, as docs/training.md says, in the place of the trainer's tests."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Place: Any = runpy.run_path(str(ROOT / "tests" / "trainer" / "conftest.py"))["Place"]


class Launches(Place):
    """A folder with a text to train on; `engine` names a file of recipes/launch."""

    def under(
        self, engine: str, recipe: str, *words: str, **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], float]:
        """Run `recipe` on two processes of this machine's processor, and say how many seconds it took."""
        command, base = self.command_under(engine, recipe, *words)
        began = os.times().elapsed
        done = subprocess.run(
            command, env={**base, **environment}, cwd=self.folder, capture_output=True, text=True, timeout=180,
            check=False,
        )  # fmt: skip
        return done, os.times().elapsed - began

    def command_under(self, engine: str, recipe: str, *words: str) -> tuple[list[str], dict[str, str]]:
        """What `under` executes, and in which environment."""
        command, base = self.command()
        launch = [
            *command[:3],
            "--config_file",
            str(ROOT / f"recipes/launch/{engine}.yaml"),
            "--main_process_port",
            "0",
        ]
        cpu = {"ACCELERATE_USE_CPU": "true"} if engine == "ddp" else {"DS_ACCELERATOR": "cpu"}
        return [*launch, str(ROOT / "tests" / recipe), *words], {**base, **cpu}

    def alone(self, recipe: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `recipe` in one process, without a launcher."""
        _, environment = self.command()
        return subprocess.run(
            [sys.executable, str(ROOT / "tests" / recipe), *words], env=environment, cwd=self.folder,
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("launches"))
