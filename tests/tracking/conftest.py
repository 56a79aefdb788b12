"""One run of two processes with every tracker that is installed; the second redoes two steps of the first."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "trainer" / "tiny_recipe.py"
ROOT = RECIPE.parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"  # as long as W&B's are


class Tracked:
    """A folder with a text, the runs made of it, and the folder trackio writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trackio, self.key = folder, folder / "trackio", KEY
        chance = random.Random(0)
        words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
        (folder / "text").write_text(" ".join(chance.choices(words, k=9000)), encoding="utf-8")
        self.installed = [name for name in ("wandb", "trackio", "tensorboard") if importlib.util.find_spec(name)]

    def environment(self, **more: str) -> dict[str, str]:
        """Without any login of whoever runs the tests, and without what says offline."""
        base = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
        here = {"HOME": str(self.folder), "TRACKIO_DIR": str(self.trackio), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        return {**base, **here, **more}

    def train(self, *words: str, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
        """The tiny recipe, under `accelerate launch` when there are several gloo ranks."""
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes"]
        launch += [str(ranks), "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
        if ranks > 1:
            environment["ACCELERATE_USE_CPU"] = "true"
        return self.python(*(launch if ranks > 1 else ()), str(RECIPE), *words, **environment)

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], env=self.environment(**environment), cwd=self.folder,
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """The run `twice`: steps 1 to 12, then 11 to 14 once more from the checkpoint of step 10.

    The first process has a key and is told to stay offline; the second launch, of two ranks, has neither.
    """
    place = Tracked(tmp_path_factory.mktemp("tracked"))
    words = ("run.name=twice", f"tracking.trackers={','.join(place.installed)}")
    first = place.train(*words, "train.max_steps=12", WANDB_API_KEY=KEY, WANDB_MODE="offline")
    assert first.returncode == 0, first.stderr
    back = "train.resume=runs/twice/checkpoints/step_00000010"
    second = place.train(*words, "train.max_steps=14", back, ranks=2)
    assert second.returncode == 0, second.stderr
    assert "is left out" not in first.stderr + second.stderr
    return place
