"""SIGTERM to a launcher under ZeRO: a checkpoint in time, and the losses of a run that nobody stopped."""

import signal
from typing import Any

import pytest

RECIPE = "trainer/tiny_recipe.py"
# without a decay the rates of a step do not depend on how long the run is to be
WORDS = ("optim.schedule=wsd", "train.checkpoint_every_steps=100000", "train.eval_sequences=2")
FURTHER = 5
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    "engine", [pytest.param("zero1", marks=pytest.mark.soak), "zero2", pytest.param("zero3", marks=pytest.mark.soak)]
)
def test_sigterm_under_zero_ends_in_a_checkpoint(launches: Any, engine: str) -> None:
    """Within 25 s both processes are gone and one checkpoint is there; it goes on as one process that never stopped."""
    name = f"stopped_{engine}"
    words = (f"run.name={name}", *WORDS, "train.micro_batch_size=1")
    process = launches.popen(*launches.command_under(engine, RECIPE, *words, "train.max_steps=100000"))
    launches.wait_for_step(name, 3, process)
    process.send_signal(signal.SIGTERM)
    launches.wait_until_gone(name, process, 25)
    assert f"runs/{name} stopped at step " in process.communicate()[1]
    (checkpoint,) = (launches.run(name) / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert max(launches.losses(name)) == step >= 3

    last = step + FURTHER
    done, _ = launches.under(engine, RECIPE, *words, f"train.max_steps={last}")
    assert done.returncode == 0, done.stderr
    assert f"runs/{name} goes on from step {step} of {last}" in done.stderr
    alone = launches.alone(RECIPE, f"run.name=unstopped_{engine}", *WORDS, f"train.max_steps={last}")
    assert alone.returncode == 0, alone.stderr
    losses, expected = launches.losses(name), launches.losses(f"unstopped_{engine}")
    assert sorted(losses) == list(range(1, last + 1))
    assert max(abs(losses[step] / expected[step] - 1) for step in expected) < TOLERANCE
