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

from moe.checkpoint import verify
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
    process = place.start(name, *LONG, ranks=ranks)
    place.wait_for_step(name, 20, process)
    process.send_signal(signal.SIGTERM)
    place.wait_until_gone(name, process, 25)
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
    process = place.start("killed", *words)
    place.wait_for_step("killed", 75, process)
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
    assert reached >= newest
    lineage = read_metrics(place.run("killed") / "metrics.jsonl")
    assert [r["train/step"] for r in lineage if "train/loss" in r] == list(range(1, 401))


def test_two_ranks_stop_between_logged_steps(place: Place) -> None:
    """Ranks agree on a stop without waiting for the next line of metrics, and evaluate fewer sequences than ranks."""
    words = ("train.log_every_steps=100000", "train.eval_sequences=1")
    process = place.start("quiet", *LONG, *words, "train.max_steps=4000", ranks=2)
    deadline = time.monotonic() + 120
    while not any(row["train/step"] >= 20 for row in _rows_so_far(place, "quiet")):  # rows of evaluations alone
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    place.wait_until_gone("quiet", process, 25)
    process.communicate()
    assert len(list((place.run("quiet") / "checkpoints").glob("step_*"))) == 1


def _rows_so_far(place: Place, name: str) -> list[dict[str, Any]]:
    return place.rows(name) if (place.run(name) / "metrics.jsonl").is_file() else []


def test_a_second_launch_of_a_living_run_changes_nothing(place: Place) -> None:
    """The ledger's lock refuses it before config.json is touched."""
    process = place.start("living", *LONG, "train.max_steps=4000")
    place.wait_for_step("living", 5, process)
    before = (place.run("living") / "config.json").read_bytes()
    second = place.python("run.name=living", "train.max_steps=77")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert second.returncode == 2, second.stderr
    assert second.stderr.count("error: ") == 1
    assert (place.run("living") / "config.json").read_bytes() == before


def _copy_of(place: Place, name: str) -> None:
    """The finished run under another name."""
    shutil.copytree(place.run("whole"), place.run(name))
    config = place.run(name) / "config.json"
    config.write_text(config.read_text().replace('"whole"', f'"{name}"'))


def test_a_rollback_sets_later_checkpoints_aside(whole: Place) -> None:
    """Going on from step 30 of a run that reached 40: the old 40 is not taken for this lineage's, the new one is."""
    _copy_of(whole, "rolled")
    checkpoints = whole.run("rolled") / "checkpoints"
    done = whole.python("run.name=rolled", "train.resume=runs/rolled/checkpoints/step_00000030", "train.max_steps=35")
    assert done.returncode == 0, done.stderr
    assert "set aside: runs/rolled/checkpoints/discarded_step_00000040" in done.stderr
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000030", "step_00000035"]
    again = whole.python("run.name=rolled")
    assert "goes on from step 35 of 40" in again.stderr
    steps = [row["train/step"] for row in read_metrics(whole.run("rolled") / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, 41))


def test_other_text_under_the_same_name_is_refused(place: Place) -> None:
    """The corpus changed between two launches: half a curve on each would be no curve."""
    assert place.python("run.name=text", "train.max_steps=10").returncode == 0
    text = place.folder / "text"
    before, facts = text.read_text(), (place.run("text") / "data.json").read_bytes()
    text.write_text(before.replace("a", "o"))
    done = place.python("run.name=text", "train.max_steps=20")
    text.write_text(before)
    assert done.returncode == 2
    assert "error: data.source=text: corpus_sha256 is" in done.stderr
    assert (place.run("text") / "data.json").read_bytes() == facts


def test_weights_that_are_not_finite_are_never_saved(place: Place) -> None:
    """A diverging run between two logged steps: the checkpoint is refused, not written as the newest."""
    words = ("optim.lr=1e30", "optim.warmup_steps=0", "train.log_every_steps=7", "train.checkpoint_every_steps=5")
    done = place.python("run.name=diverged", *words)
    assert done.returncode == 2, done.stderr
    assert "error: train/loss is" in done.stderr
    assert not list((place.run("diverged") / "checkpoints").iterdir())


def test_a_full_disk_ends_in_a_sentence(place: Place, tmp_path: Path) -> None:
    """One mebibyte, filled by checkpoints: what was saved before is whole, and nothing half-written is left."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("runs on a machine where root may mount a tmpfs, such as a privileged container")
    try:
        done = place.python(
            "run.name=full", f"run.directory={tmp_path}", "train.checkpoint_every_steps=1", "train.keep_checkpoints=99"
        )
        assert done.returncode == 2, done.stderr
        assert "cannot be written" in done.stderr
        assert "Traceback" not in done.stderr
        left = list((tmp_path / "full" / "checkpoints").iterdir())
        assert left
        for path in left:
            verify(path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_damaged_checkpoint_is_passed_over(whole: Place) -> None:
    """One flipped byte in the newest: it is named, and the one before is used."""
    _copy_of(whole, "damaged")
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


def test_a_dense_run_needs_no_router(place: Place) -> None:
    """n_routed_experts=0: the same loop, no router metrics."""
    words = ("model.n_routed_experts=0", "model.first_k_dense_replace=0", "train.max_steps=3")
    done = place.python("run.name=dense", *words)
    assert done.returncode == 0, done.stderr
    assert not any(key.startswith("router/") for row in place.rows("dense") for key in row)
