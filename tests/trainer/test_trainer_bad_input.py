"""What a user can get wrong at the command line: one sentence, exit code 2, no traceback, nothing lost."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Place = Any  # the fixture's class; conftest is not importable by name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train.max_step=3"], "did you mean 'max_steps'?"),
        (["train.max_steps=soon"], "train.max_steps=soon must be a whole number"),
        (["model.num_experts_per_tok=5"], "must be between 1 and n_routed_experts (4)"),
        (["data.source=nowhere"], "data.source='nowhere' does not exist"),
        (["run.name=../escape"], "run.name='../escape' must be a plain folder name"),
        (
            ["train.resume=runs/none/checkpoints/step_00000001"],
            "train.resume='runs/none/checkpoints/step_00000001' is not a folder; give auto, never, or a checkpoint",
        ),
        (["train.micro_batch_size=3"], "train.global_batch_size=4 must be a multiple of ranks (1)"),
        (["train.seq_len=4096", "model.max_position_embeddings=4096"], "train.seq_len=4096 exceeds the data"),
        (["model.vocab_size=5000"], "model.vocab_size=5000 is more than this corpus yields"),
        (["energy.declared_power_w=-1"], "energy.declared_power_w=-1.0 must be above 0"),
    ],
)
def test_a_mistake_is_one_sentence(place: Place, words: list[str], sentence: str) -> None:
    """The last line is the sentence, nothing looks like a traceback, and no other folder appears."""
    around = {path.name for path in place.folder.iterdir()} | {"runs"}
    done = place.python("run.name=bad", *words)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in done.stderr
    assert {path.name for path in place.folder.iterdir()} | {"runs"} == around
    assert {path.name for path in (place.folder / "runs").glob("*")} <= {"bad", "whole", "tiny"}


def test_an_unwritable_run_directory(place: Place) -> None:
    """A plain file where the folder should be refuses root too."""
    (place.folder / "blocked").write_text("a file, not a folder")
    done = place.python("run.directory=blocked")
    assert done.returncode == 2
    assert "error: run.name='tiny': blocked/tiny cannot be written (Not a directory)" in done.stderr


def test_a_changed_recipe_does_not_touch_the_run(whole: Place) -> None:
    """Another architecture, data or schedule under an existing name: refused, and the run stays as it was."""
    before = {path: path.read_bytes() for path in whole.run("whole").rglob("*") if path.is_file()}
    done = whole.python("run.name=whole", "model.hidden_size=32")
    assert done.returncode == 2
    assert (
        "error: model.hidden_size=32 differs from run 'whole', which has 16; choose another run.name for a new run"
        in done.stderr
    )
    assert {path: path.read_bytes() for path in whole.run("whole").rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_run_is_refused(whole: Place) -> None:
    """Its cost is in another ledger: the comparison would be flattered."""
    done = whole.python("run.name=thief", "train.resume=runs/whole/checkpoints/step_00000030")
    assert done.returncode == 2
    assert "is not in runs/thief/checkpoints: what another run spent on it would be missing" in done.stderr


def test_signals_are_given_back(place: Place) -> None:
    """After a failed start Ctrl-C and SIGTERM do again what they did before."""
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny_recipe import RECIPE\n"
        "from moe.config import parse_overrides\n"
        "from moe.errors import DataError\n"
        "from moe.trainer import train\n"
        "before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]\n"
        "try: train(parse_overrides(RECIPE, ['run.name=signals', 'data.source=nowhere']))\n"
        "except DataError: print([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before)\n"
    )
    _, environment = place.command()
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], env=environment, cwd=place.folder,
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def test_mixed_precision_of_the_launcher_must_not_contradict(place: Place) -> None:
    """train.precision decides; a launcher that says otherwise is told."""
    done = place.python("run.name=bad", environment={"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert done.returncode == 2
    assert "error: train.precision='fp32' contradicts accelerate's --mixed_precision fp16" in done.stderr


def test_two_processes_that_train_alone_are_refused(place: Place) -> None:
    """Without a GPU and without ACCELERATE_USE_CPU accelerate trains each process alone; the sentence comes once."""
    command, environment = place.command("run.name=alone", ranks=2)
    environment.pop("ACCELERATE_USE_CPU")
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("runs on a machine without a GPU: with one the launch is right")
    done = subprocess.run(command, env=environment, cwd=place.folder, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert done.stderr.count("accelerate trains each of them alone") == 1
    assert not (place.run("alone") / "metrics.jsonl").exists()


def test_help_is_about_the_recipe(place: Place) -> None:
    """--help lists fields with this recipe's values and starts nothing."""
    done = place.python("--help")
    assert done.returncode == 0
    assert "  train.max_steps=40" in done.stdout
    assert not Path(place.folder / "runs" / "tiny").exists()
