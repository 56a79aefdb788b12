"""DDP and ZeRO-1, 2 and 3 on two gloo processes train as one process does, and go on from one another's checkpoints."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

RECIPE, SPIKY = "trainer/tiny_recipe.py", "parallel/spiky_recipe.py"
STEPS, HALF = 10, 5
# a gradient that is clipped, parameters that two ranks cannot halve, an evaluation they cannot share evenly
WORDS = (
    f"train.max_steps={STEPS}", "train.checkpoint_every_steps=1", f"train.keep_checkpoints={STEPS}",
    "optim.grad_clip=0.5", "model.kv_lora_rank=7", "train.eval_sequences=7",
)  # fmt: skip
# widths that two ranks cut into whole vectors: torch's AdamW rounds the entries that fill no vector in another way
EVEN = (
    f"train.max_steps={STEPS}", "train.checkpoint_every_steps=1", f"train.keep_checkpoints={STEPS}",
    "optim.grad_clip=0.5", "model.hidden_size=32", "model.kv_lora_rank=32", "train.eval_sequences=2",
)  # fmt: skip
TOLERANCE = 1e-5
# engine -> the one that goes on from its checkpoint
THEN = {"ddp": "zero1", "zero1": "one process", "zero2": "one process", "zero3": "zero3"}


@dataclass
class Run:
    """What a run left behind, read while it was there."""

    done: subprocess.CompletedProcess[str]
    elapsed_s: float
    rows: list[dict[str, Any]]
    weights: dict[int, dict[str, Tensor]]
    optimizer: dict[int, dict[str, Tensor]]

    def column(self, name: str) -> dict[int, float]:
        return {row["train/step"]: row[name] for row in self.rows if name in row}


def read(place: Any, name: str, done: subprocess.CompletedProcess[str], elapsed_s: float) -> Run:
    assert done.returncode == 0, done.stderr
    folders = {step: place.run(name) / f"checkpoints/step_{step:08d}" for step in (1, STEPS)}
    model, optimizer = (
        {step: load_file(folder / f"{file}.safetensors") for step, folder in folders.items()}
        for file in ("model", "optimizer")
    )
    return Run(done, elapsed_s, place.rows(name), model, optimizer)


def far(ours: dict[Any, Any], theirs: dict[Any, Any]) -> float:
    """The largest difference, relative to the number itself or to the largest of its tensor."""
    assert ours.keys() == theirs.keys()
    pairs = [(torch.as_tensor(ours[key]).double(), torch.as_tensor(theirs[key]).double()) for key in theirs]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


@pytest.fixture(scope="module")
def one(launches: Any) -> Run:
    """One process, without accelerate's launcher."""
    return read(launches, "one", launches.alone(RECIPE, "run.name=one", *WORDS), 0.0)


@pytest.fixture(scope="module")
def halves(launches: Any) -> Run:
    """One process, two micro-batches a step."""
    words = ("run.name=halves", *EVEN, "train.micro_batch_size=2")
    return read(launches, "halves", launches.alone(RECIPE, *words), 0.0)


@pytest.fixture(scope="module", params=list(THEN))
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def two(launches: Any, engine: str) -> Run:
    """Two processes under `engine`, two micro-batches a step."""
    words = (f"run.name={engine}", *WORDS, "train.micro_batch_size=1", "tracking.trackers=wandb")
    return read(launches, engine, *launches.under(engine, RECIPE, *words))


def test_the_launch_file_starts_its_engine(launches: Any, engine: str, two: Run) -> None:
    """environment.json says under which engine, and on how many processes."""
    facts = json.loads((launches.run(engine) / "environment.json").read_text())
    assert (facts["engine"], facts["world_size"]) == (engine, 2)


def test_every_step_is_that_of_one_process(one: Run, two: Run) -> None:
    """Loss, norm of the gradient before clipping, and validation loss, from the first step on."""
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/max_vio"):
        assert far(two.column(name), one.column(name)) < TOLERANCE, name
    assert min(one.column("train/grad_norm").values()) > 0.5, "the gradient was clipped"


def test_the_first_step_is_that_of_one_process(one: Run, two: Run) -> None:
    """Its update is the whole of what a wrong gradient would change, before later steps hide it."""
    assert far(two.weights[1], one.weights[1]) < TOLERANCE
    assert far(two.optimizer[1], one.optimizer[1]) < TOLERANCE


def test_the_last_weights_and_biases_are_those_of_one_process(one: Run, two: Run) -> None:
    """Checkpoints hold whole tensors under the parameters' names, whatever shares the ranks had."""
    assert far(two.weights[STEPS], one.weights[STEPS]) < TOLERANCE
    assert far(two.optimizer[STEPS], one.optimizer[STEPS]) < TOLERANCE
    bias = "layers.1.mlp.router.expert_bias"
    assert one.weights[STEPS][bias].any()
    assert torch.equal(two.weights[STEPS][bias], one.weights[STEPS][bias])


def test_with_the_same_micro_batches_it_is_one_process_bit_for_bit(launches: Any, halves: Run, engine: str) -> None:
    """A rank's micro-batch is one of two that one process adds up: the same products, and a sum of two either way."""
    name = f"{engine}-bits"
    two = read(launches, name, *launches.under(engine, RECIPE, f"run.name={name}", *EVEN))
    for column in ("train/loss", "train/grad_norm"):
        assert two.column(column) == halves.column(column)
    for ours, theirs in ((two.weights, halves.weights), (two.optimizer, halves.optimizer)):
        assert far(ours[STEPS], theirs[STEPS]) == 0


@pytest.mark.parametrize("sharded", ["zero2", "zero3"])
def test_products_in_8_bits_are_those_of_one_process(launches: Any, sharded: str) -> None:
    """Weights are quantised where they are multiplied, whoever holds them between steps: bit for bit again."""
    words = (*EVEN, "train.max_steps=3", "train.keep_checkpoints=3", "train.precision=fp8")
    found = {}
    for name, engine in ((f"fp8-beside-{sharded}", None), (f"fp8-{sharded}", sharded)):
        said = (f"run.name={name}", *words, *(() if engine else ("train.micro_batch_size=2",)))
        done = launches.under(engine, RECIPE, *said)[0] if engine else launches.alone(RECIPE, *said)
        assert done.returncode == 0, done.stderr
        losses = [row["train/loss"] for row in launches.rows(name) if "train/loss" in row]
        found[name] = losses, load_file(launches.run(name) / "checkpoints/step_00000003/model.safetensors")
    (want, weights), (losses, found_weights) = found.values()
    assert len(want) == 3
    assert losses == want
    assert far(found_weights, weights) == 0


def test_one_tracker_and_one_ledger(launches: Any, engine: str, two: Run) -> None:
    """W&B is opened by the first rank; one process reads this host's sensors, and its hours count once."""
    run: Path = launches.run(engine)
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    assert [path.name for path in run.glob("ledger*.jsonl")] == ["ledger.jsonl"]
    kinds = [json.loads(line)["kind"] for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert kinds.count("segment") == 1
    hours = max(row["train/device_hours"] for row in two.rows if "train/device_hours" in row)
    assert 0 < hours * 3600 < two.elapsed_s


def test_what_people_read_is_readable(two: Run) -> None:
    """DeepSpeed's chatter and other projects' warnings stay out of the terminal."""
    lines = [line for line in two.done.stderr.splitlines() if line.strip() and "step/s" not in line]
    assert len(lines) <= 6, two.done.stderr
    assert "Warning" not in two.done.stderr


def test_a_run_goes_on_under_another_engine(launches: Any, engine: str, one: Run, two: Run) -> None:
    """From the middle of what one engine did, another ends where one process does."""
    words = [f"run.name={engine}", *WORDS, f"train.resume=runs/{engine}/checkpoints/step_{HALF:08d}"]
    if THEN[engine] == "one process":
        again = read(launches, engine, launches.alone(RECIPE, *words), 0.0)
    else:
        words += ["train.micro_batch_size=1"] if THEN[engine] == engine else []
        again = read(launches, engine, *launches.under(THEN[engine], RECIPE, *words))
    assert [row["resumed_step"] for row in again.rows if "resumed_step" in row][-1] == HALF
    assert far(again.column("train/loss"), one.column("train/loss")) < TOLERANCE
    assert far(again.weights[STEPS], one.weights[STEPS]) < TOLERANCE
    assert far(again.optimizer[STEPS], one.optimizer[STEPS]) < TOLERANCE
    if THEN[engine] == engine:  # bit for bit then
        assert again.column("train/loss") == two.column("train/loss")


@pytest.mark.parametrize(("stage", "policy"), [("zero2", "rollback"), ("zero3", "skip")])
def test_a_refused_update_leaves_nothing_behind(launches: Any, stage: str, policy: str) -> None:
    """A gradient that is not finite is dropped in all its parts, or everything is made anew, as with one process."""
    words = (
        "train.max_steps=7",
        "train.checkpoint_every_steps=2",
        "train.eval_sequences=6",
        f"train.on_spike={policy}",
    )
    alone = launches.alone(SPIKY, f"run.name=one_{policy}", *words, "train.micro_batch_size=2")
    assert alone.returncode == 0, alone.stderr
    done, _ = launches.under(stage, SPIKY, f"run.name={policy}", *words, "train.micro_batch_size=1")
    assert done.returncode == 0, done.stderr
    assert ("skipped: " if policy == "skip" else "rolled back to step 2: ") in done.stderr
    assert far(launches.losses(policy), launches.losses(f"one_{policy}")) < TOLERANCE
