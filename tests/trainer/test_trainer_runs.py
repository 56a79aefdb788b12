"""Whole runs through `accelerate launch`: what they leave behind, on one rank, on two, after signals and kills."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe.config import Recipe
from moe.energy import fold_ledgers
from moe.model import Transformer
from moe.rundir import RunDir, read_metrics

Place = Any  # the fixture's class; conftest is not importable by name


def test_a_run_leaves_a_whole_directory(whole: Place) -> None:
    """Every file of the contract, readable: recipe, environment, data facts, metrics, ledger, checkpoints."""
    run = RunDir.existing(whole.run("whole"))
    recipe = Recipe.from_dict(run.read_json(run.config))
    assert recipe.run.name == "whole"
    environment = run.read_json(run.environment)
    assert environment["world_size"] == 1
    assert environment["versions"]["torch"] == torch.__version__
    assert run.read_json(run.data)["vocab_size"] == 300
    assert list(whole.losses("whole")) == list(range(1, 41))
    rows = read_metrics(run.metrics)
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["train/step"] for row in evaluations] == [0, 10, 20, 30, 40]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 1
    assert evaluations[-1]["train/tokens"] == 40 * 4 * 32
    assert {"eval/loss_se", "eval/bits_per_byte", "eval/max_vio", "eval/dead_experts"} <= set(evaluations[-1])
    last = [row for row in rows if "train/loss" in row][-1]
    assert {"train/lr", "train/grad_norm", "train/device_hours", "energy/total_kwh", "router/max_vio"} <= set(last)
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step_00000030", "step_00000040"]
    model = Transformer.from_pretrained(run.checkpoints / "step_00000040")
    assert model.layers[1].mlp.router.expert_bias.abs().max() > 0


def test_the_ledger_prices_the_run(whole: Place) -> None:
    """Phases sum to the total exactly; every step is useful; the run ends cleanly; the estimate says it is one."""
    fold = fold_ledgers(RunDir(whole.run("whole")).ledgers()).to_json()
    total = fold["total"]
    assert total["energy_j"] > 0
    assert 0 < total["useful_device_hours"] < total["device_hours"]
    assert sum(round(phase["energy_j"] * 1000) for phase in fold["phases"].values()) == total["energy_mj"]
    assert {"data", "forward_backward", "optimizer", "evaluation", "checkpoint"} <= set(fold["phases"])
    assert [segment["ended"] for segment in fold["segments"]] == ["end"]
    if total["source"].startswith("estimate"):
        assert not total["measured"]


def test_a_finished_run_says_so(whole: Place) -> None:
    """resume=auto on a complete run does nothing and exits with 0; never refuses; both in one sentence."""
    before = {path: path.stat().st_mtime_ns for path in whole.run("whole").rglob("*") if path.is_file()}
    again = whole.python("run.name=whole")
    assert again.returncode == 0
    assert "runs/whole is complete at step 40" in again.stderr
    never = whole.python("run.name=whole", "train.resume=never")
    assert never.returncode == 2
    assert never.stderr.strip().splitlines() == [
        "error: run.name='whole' exists in runs and train.resume=never; choose another run.name, "
        "or train.resume=auto to go on"
    ]
    assert {path: path.stat().st_mtime_ns for path in whole.run("whole").rglob("*") if path.is_file()} == before


def test_two_ranks_train_as_one(whole: Place) -> None:
    """The same batches, losses, biases and weights, whatever the number of gloo processes."""
    done = whole.launch("run.name=two", "train.micro_batch_size=1", ranks=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((whole.run("two") / "environment.json").read_text())["world_size"] == 2
    one, two = whole.losses("whole"), whole.losses("two")
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    mine, theirs = (load_file(whole.run(n) / "checkpoints/step_00000040/model.safetensors") for n in ("whole", "two"))
    bias = "layers.1.mlp.router.expert_bias"
    assert torch.equal(mine[bias], theirs[bias])
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=1e-3, msg=name)


def _start(place: Place, name: str, *words: str, ranks: int = 1) -> subprocess.Popen[str]:
    command, environment = place.command(f"run.name={name}", *words, ranks=ranks)
    return subprocess.Popen(
        command,
        env={**environment, "PYTHONFAULTHANDLER": "1"},
        cwd=place.folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_step(place: Place, name: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (place.run(name) / "metrics.jsonl").is_file() or max(place.losses(name), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _trainer_pids(place: Place, name: str) -> list[int]:
    """Living processes that train this run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            here = os.readlink(entry / "cwd") == str(place.folder)
        except OSError:
            continue
        if here and f"run.name={name}".encode() in words and b"accelerate.commands.launch" not in words:
            found.append(int(entry.name))
    return found


def _wait_until_gone(place: Place, name: str, process: subprocess.Popen[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while pids := _trainer_pids(place, name):
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGABRT)  # faulthandler writes where it hangs to the captured stderr
            pytest.fail(f"the trainer outlived its stop: {process.communicate()[1]}")
        time.sleep(0.05)


LONG = ("train.max_steps=400", "optim.warmup_steps=5", "train.checkpoint_every_steps=100000")


@pytest.fixture(scope="module")
def long_losses(place: Place) -> dict[int, float]:
    """Losses of the long run nobody stopped."""
    done = place.launch("run.name=long", *LONG)
    assert done.returncode == 0, done.stderr
    return place.losses("long")


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_to_the_launcher_ends_in_a_checkpoint(place: Place, long_losses: dict[int, float], ranks: int) -> None:
    """Within 25 s the trainer is gone and a checkpoint of the step in hand is there; going on is bitwise the same."""
    name = f"stopped{ranks}"
    process = _start(place, name, *LONG, ranks=ranks)
    _wait_for_step(place, name, 20, process)
    process.send_signal(signal.SIGTERM)
    _wait_until_gone(place, name, process, 25)
    process.communicate()
    steps = sorted(int(path.name[5:]) for path in (place.run(name) / "checkpoints").iterdir())
    assert len(steps) == 1
    assert 20 <= steps[0] < 400
    assert max(place.losses(name)) == steps[0]
    done = place.launch(f"run.name={name}", *LONG, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"runs/{name} goes on from step {steps[0]} of 400" in done.stderr
    losses = place.losses(name)
    assert losses.keys() == long_losses.keys()
    if ranks == 1:
        assert losses == long_losses  # bitwise
    else:  # two ranks add gradients in another order; a token at a tie may then change its expert, so not for ever
        assert max(abs(losses[step] - long_losses[step]) for step in range(1, steps[0] + 20)) < 1e-4
    fold = fold_ledgers(RunDir(place.run(name)).ledgers()).to_json()
    assert [segment["ended"] for segment in fold["segments"]] == ["end", "end"]


def test_kill_9_loses_no_ledger_and_resumes_bitwise(place: Place, long_losses: dict[int, float]) -> None:
    """SIGKILL between checkpoints: the next launch goes on from the last one; lost work is counted but not useful."""
    words = [*LONG[:2], "train.checkpoint_every_steps=30"]
    process = _start(place, "killed", *words)
    _wait_for_step(place, "killed", 75, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = max(place.losses("killed"))
    newest = max(int(path.name[5:]) for path in (place.run("killed") / "checkpoints").glob("step_*"))
    done = place.launch("run.name=killed", *words)
    assert done.returncode == 0, done.stderr
    assert place.losses("killed") == long_losses
    fold = fold_ledgers(RunDir(place.run("killed")).ledgers()).to_json()
    assert [segment["ended"] for segment in fold["segments"]] == ["lost", "end"]
    assert fold["segments"][1]["first_step"] == newest
    assert reached > newest
    lineage = read_metrics(place.run("killed") / "metrics.jsonl")
    assert [r["train/step"] for r in lineage if "train/loss" in r] == list(range(1, 401))


def test_a_damaged_checkpoint_is_passed_over(whole: Place) -> None:
    """One flipped byte in the newest: it is named, and the one before is used."""
    shutil.copytree(whole.run("whole"), whole.run("damaged"))
    config = whole.run("damaged") / "config.json"
    config.write_text(config.read_text().replace('"whole"', '"damaged"'))
    file = whole.run("damaged") / "checkpoints/step_00000040/model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done = whole.python("run.name=damaged")
    assert done.returncode == 0, done.stderr
    assert "passed over: runs/damaged/checkpoints/step_00000040/model.safetensors does not match" in done.stderr
    assert "goes on from step 30 of 40" in done.stderr
    assert whole.losses("damaged") == whole.losses("whole")


def test_a_budget_stops_with_a_checkpoint(place: Place) -> None:
    """train.max_device_hours: the run stops early, says why, and can go on."""
    done = place.python("run.name=budget", "train.max_device_hours=1e-9")
    assert done.returncode == 0, done.stderr
    assert "runs/budget stopped at step 1 because its budget is spent" in done.stderr
    assert [path.name for path in (place.run("budget") / "checkpoints").iterdir()] == ["step_00000001"]


def test_wandb_offline_holds_the_metrics(place: Place) -> None:
    """Without a key W&B writes files; one run, with our axes and values in it."""
    done = place.python("run.name=watched", "tracking.trackers=wandb", "train.max_steps=4")
    assert done.returncode == 0, done.stderr
    files = list(place.run("watched").rglob("run-*.wandb"))
    assert len(files) == 1
    raw = files[0].read_bytes()
    for name in (b"train", b"eval", b"energy", b"total_kwh", b"device_hours"):
        assert name in raw


def test_a_dense_run_needs_no_router(place: Place) -> None:
    """n_routed_experts=0: the same loop, no router metrics."""
    words = ("model.n_routed_experts=0", "model.first_k_dense_replace=0", "train.max_steps=3")
    done = place.python("run.name=dense", *words)
    assert done.returncode == 0, done.stderr
    assert not any(key.startswith("router/") for row in place.rows("dense") for key in row)
