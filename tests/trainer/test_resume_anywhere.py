"""A stop at any step: going on gives bitwise the losses, weights, moments, biases and random state of no stop."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moe.energy import fold_ledgers
from moe.rundir import RunDir, read_metrics

Place = Any  # the fixture's class; conftest is not importable by name
STEPS = 12
WORDS = [
    f"train.max_steps={STEPS}", "train.checkpoint_every_steps=1", "train.keep_checkpoints=99",
    "train.micro_batch_size=2", "train.spike_sigmas=50", "train.on_spike=skip", "train.eval_every_tokens=512",
]  # fmt: skip
OPTIONS = {
    "as it is": [],
    "Muon, warm-up-stable-decay": ["optim.name=muon", "optim.schedule=wsd", "optim.decay_steps=5"],
    "bf16, recomputed, quantile, multi-token prediction": [
        "train.precision=bf16", "train.recompute_layers=1", "balance.method=quantile", "balance.quantile_step=0.5",
        "model.num_nextn_predict_layers=1", "data.mask_documents=true",
    ],
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_stop_at_any_step_changes_nothing(place: Place, options: list[str]) -> None:
    """Every one of the run's checkpoints, gone on from to the end."""
    name = f"unstopped{len(options)}"
    words = [*WORDS, *options]
    done = place.python(f"run.name={name}", *words)
    assert done.returncode == 0, done.stderr
    expected = place.losses(name)
    assert sorted(expected) == list(range(1, STEPS + 1))
    for step in range(1, STEPS):
        _copy_up_to(place, name, step)
    code = """
        import sys; sys.path.insert(0, sys.argv[1])
        from tiny_recipe import RECIPE, main
        for step in range(1, int(sys.argv[3])): main(RECIPE, [f"run.name={sys.argv[2]}-{step}", *sys.argv[4:]])
    """
    _, environment = place.command()
    again = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), name, str(STEPS), *words],
        env=environment, cwd=place.folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    for step in range(1, STEPS):
        stopped = f"{name}-{step}"
        assert f"runs/{stopped} goes on from step {step} of {STEPS}" in again.stderr
        rows = [row for row in read_metrics(place.run(stopped) / "metrics.jsonl") if "train/loss" in row]
        assert {row["train/step"]: row["train/loss"] for row in rows} == expected
        last = f"checkpoints/step_{STEPS:08d}"
        for file in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
            mine, theirs = load_file(place.run(stopped) / last / file), load_file(place.run(name) / last / file)
            assert mine.keys() == theirs.keys()
            assert all(mine[key].equal(theirs[key]) for key in mine), (step, file)
        fold = fold_ledgers(RunDir(place.run(stopped)).ledgers()).to_json()
        assert len(fold["segments"]) == 2
        assert fold["segments"][1]["first_step"] == step


def _copy_up_to(place: Place, name: str, step: int) -> None:
    """The run under another name, as a kill right after the checkpoint of `step` would have left it."""
    source, target = place.run(name), place.run(f"{name}-{step}")
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    for file in ("config.json", "ledger.jsonl"):
        (target / file).write_text((target / file).read_text().replace(f'"{name}"', f'"{target.name}"'))
    position = json.loads((target / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())["ledger"]
    lines = (source / "ledger.jsonl").read_text().splitlines(keepends=True)
    (target / "ledger.jsonl").write_text("".join(lines[: position["seq"] + 1]))
