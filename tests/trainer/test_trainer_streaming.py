"""Runs on a stream, which has no numbers: they go on where they stopped, and past what a rollback passed over."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.rundir import read_metrics

Place = Any  # the fixture's class; conftest is not importable by name
STEPS = 10


@pytest.fixture(scope="module")
def words(place: Place) -> list[str]:
    """Forty documents as JSON lines, of which a run of ten steps reads about half, and the words that stream them."""
    text = (place.folder / "text").read_text()
    lines = [json.dumps({"text": text[start : start + 700]}) for start in range(0, 28_000, 700)]
    (place.folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return [
        "data.source=documents.jsonl", "data.streaming=true", "data.validation_documents=4", "train.eval_sequences=2",
        f"train.max_steps={STEPS}", "train.checkpoint_every_steps=1", "train.keep_checkpoints=99",
    ]  # fmt: skip


def test_a_stream_goes_on_from_any_step(place: Place, words: list[str]) -> None:
    """Bitwise the losses of the run nobody stopped; another number of ranks is one sentence."""
    done = place.python("run.name=stream", *words)
    assert done.returncode == 0, done.stderr
    expected = place.losses("stream")
    assert len(expected) == STEPS
    for step in (1, 4, 9):
        name = f"stream{step}"
        shutil.copytree(place.run("stream"), place.run(name))
        for path in (place.run(name) / "checkpoints").iterdir():
            if int(path.name.removeprefix("step_")) > step:
                shutil.rmtree(path)
        config = place.run(name) / "config.json"
        config.write_text(config.read_text().replace('"stream"', f'"{name}"'))
        again = place.python(f"run.name={name}", *words)
        assert again.returncode == 0, again.stderr
        assert f"goes on from step {step} of {STEPS}" in again.stderr
        assert place.losses(name) == expected
    shutil.rmtree(place.run("stream9") / "checkpoints" / f"step_{STEPS:08d}")
    refused = place.launch("run.name=stream9", *words, ranks=2)
    assert refused.returncode != 0
    (sentence,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "data.streaming=true: this run's place in 'documents.jsonl' is that of 1 ranks, and there are 2" in sentence


def test_a_shuffled_stream_goes_on_after_a_kill(place: Place, words: list[str]) -> None:
    """Killed in its second block: bitwise the losses of the run nobody killed."""
    shuffled = [*words, "data.shuffle_buffer=7", "train.max_steps=45"]
    done = place.python("run.name=shuffled", *shuffled)
    assert done.returncode == 0, done.stderr
    killed = place.python("run.name=killed", *shuffled, recipe="hooked_recipe.py", environment={"KILL": "40"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = max((place.run("killed") / "checkpoints").glob("step_????????"))
    assert json.loads((newest / "state.json").read_text())["data"][0]["documents"]["block"] == 1
    again = place.python("run.name=killed", *shuffled)
    assert again.returncode == 0, again.stderr
    assert "goes on from step 3" in again.stderr
    assert len(place.losses("killed")) == 45
    assert place.losses("killed") == place.losses("shuffled")


def test_a_rollback_reads_on_in_every_source(place: Place, words: list[str], tmp_path: Path) -> None:
    """Of two weighted sources, a sequence a micro-batch: each passes over its own, and none is read twice."""
    lines = (place.folder / "documents.jsonl").read_text().splitlines(keepends=True)
    (place.folder / "odd.jsonl").write_text("".join(lines[1::2]))
    (place.folder / "even.jsonl").write_text("".join(lines[::2]))
    mixed = [*words, "data.source=odd.jsonl,even.jsonl", "data.weights=1,1", "train.micro_batch_size=1"]
    calm, seen = tmp_path / "calm", tmp_path / "seen"
    done = place.python("run.name=mixed", *mixed, recipe="hooked_recipe.py", environment={"SEEN": str(calm)})
    assert done.returncode == 0, done.stderr
    back = [*mixed, "train.on_spike=rollback", "train.checkpoint_every_steps=4", "train.max_steps=8"]
    environment = {"SEEN": str(seen), "POISON": "22"}  # of four sequences a step: in the sixth
    done = place.python("run.name=mixed_back", *back, recipe="hooked_recipe.py", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "rolled back to step 4: " in done.stderr
    batches = np.loadtxt(calm, dtype=int).tolist()
    assert np.loadtxt(seen, dtype=int).tolist() == [*batches[:24], *batches[24:40]]


def test_a_rank_without_documents_says_so(place: Place, words: list[str]) -> None:
    """What the first rank does not meet, the other says, once."""
    text = (place.folder / "text").read_text()
    texts = (text[:9000], text[9000:])
    (place.folder / "single.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    one = [*words, "data.source=single.jsonl", "data.validation_documents=1", "train.eval_sequences=2"]
    done = place.launch("run.name=single", *one, ranks=2)
    assert done.returncode != 0
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data.source='single.jsonl' has no text for each of 2 ranks" in sentence
    assert sentence.endswith("(rank 1)")


def test_a_rollback_reads_on(place: Place, words: list[str], tmp_path: Path) -> None:
    """From the checkpoint of step 4 past the batch that was not finite: in that process, and in one that resumes."""
    calm, seen = tmp_path / "calm", tmp_path / "seen"
    longer = [*words, "train.max_steps=14"]
    done = place.python("run.name=calmly", *longer, recipe="hooked_recipe.py", environment={"SEEN": str(calm)})
    assert done.returncode == 0, done.stderr
    back = [*words, "train.on_spike=rollback", "train.checkpoint_every_steps=4"]
    environment = {"SEEN": str(seen), "POISON": "6"}
    done = place.python("run.name=back", *back, recipe="hooked_recipe.py", environment=environment)
    assert done.returncode == 0, done.stderr
    assert "rolled back to step 4: " in done.stderr
    batches = np.loadtxt(calm, dtype=int).tolist()
    assert np.loadtxt(seen, dtype=int).tolist() == [*batches[:6], *batches[6:12]]  # steps 1-6, then 5-10 with the next
    expected = place.losses("back")

    shutil.rmtree(place.run("back") / "checkpoints" / f"step_{STEPS:08d}")
    shutil.rmtree(place.run("back") / "checkpoints" / "step_00000008")
    again = place.python("run.name=back", *back, recipe="hooked_recipe.py")
    assert "goes on from step 4 of 10" in again.stderr
    rows = [row for row in read_metrics(place.run("back") / "metrics.jsonl") if "train/loss" in row]
    assert {row["train/step"]: row["train/loss"] for row in rows} == expected
