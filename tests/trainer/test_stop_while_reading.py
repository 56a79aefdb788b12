"""A stop that comes while text is read or tokenised, before the first step."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe.config import ModelConfig, Recipe, RunConfig
from moe.data.sources import Source
from moe.data.tokenizer import train_tokenizer
from moe.energy import fold_ledgers
from moe.rundir import RunDir
from moe.trainer.data import load_run_data
from moe.trainer.hooks import Hooks
from moe.trainer.signals import Stopped, StopRequest

Place = Any  # the fixture's class; conftest is not importable by name


@pytest.fixture
def silent(place: Place) -> Iterator[str]:
    """A source that nothing comes out of, as of a disk or network that hangs."""
    os.mkfifo(place.folder / "silent")
    yield "silent"
    (place.folder / "silent").unlink()


@pytest.fixture
def endless(place: Place) -> Iterator[str]:
    """A source that a line comes out of every few milliseconds, so that whoever reads it keeps waking up."""
    path = place.folder / "endless"
    os.mkfifo(path)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), path.open("w", buffering=1) as pipe:
            while True:
                pipe.write("a line of text that somebody else writes\n")
                time.sleep(0.002)

    threading.Thread(target=write, daemon=True).start()
    yield "endless"
    path.unlink()


@pytest.mark.parametrize(("ranks", "given"), [(1, False), (2, False), (2, True)], ids=["alone", "of two", "tokenising"])
def test_a_run_that_waits_for_text_stops(place: Place, silent: str, ranks: int, given: bool) -> None:
    """Though the tokenizer's own code waits for the text: it says so, nothing is half-written, and text mends it.

    With a tokenizer `given` it waits to tokenise, and the other rank for the first.
    """
    name = f"waiting{ranks}{given}"
    words = [f"data.source={silent}"]
    if given:
        train_tokenizer([(place.folder / "text").read_text()], 300, place.folder / "tokenizer.json")
        words.append("data.tokenizer=tokenizer.json")
    process = place.start(name, *words, ranks=ranks)
    place.wait_for_step(name, 0, process)
    while given and not (place.run(name) / "tokenizer.json").is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    place.wait_until_gone(name, process, 25)
    said = process.communicate()[1]
    assert f"runs/{name} stopped at step 0 because SIGTERM asked it to; the same command goes on from there" in said
    assert place.losses(name) == {}
    run = RunDir.existing(place.run(name))
    assert not list(run.checkpoints.iterdir())
    assert run.tokenizer.exists() == given
    assert not run.tokens.exists()
    assert not list(run.root.glob(".making_*"))
    assert [segment["ended"] for segment in fold_ledgers(run.ledgers()).to_json()["segments"]] == ["end"]
    mended = place.python(f"run.name={name}", "train.max_steps=2")
    assert mended.returncode == 0, mended.stderr
    assert len(place.losses(name)) == 2


@pytest.mark.parametrize(("number", "source"), [(signal.SIGTERM, "endless"), (signal.SIGINT, "silent")])
def test_the_exit_code_names_the_signal(
    place: Place, number: signal.Signals, source: str, request: pytest.FixtureRequest
) -> None:
    """Without a launcher: 128 + signal, no traceback, and no thread takes the process down on its way out."""
    source = request.getfixturevalue(source)
    (*_, recipe, word), environment = place.command(f"run.name={number.name}")
    process = place.popen([sys.executable, recipe, word, f"data.source={source}"], environment)
    place.wait_for_step(number.name, 0, process)
    time.sleep(1)  # into the text
    process.send_signal(number)
    said = process.communicate(timeout=25)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert f"runs/{number.name} stopped at step 0 because {number.name} asked it to" in said


def test_a_reader_that_was_left_writes_nothing_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train() called from Python: the process lives on, with the thread; the run may be another's by then."""
    go_on = threading.Event()

    class Slow(Source):
        name = "slow"

        def _read(self, split: str) -> Iterator[str]:
            yield "some words " * 10
            os.kill(os.getpid(), signal.SIGTERM)
            go_on.wait(30)
            yield "more words " * 10

    monkeypatch.setattr("moe.trainer.data.open_sources", lambda config: [Slow()])
    model = ModelConfig(
        vocab_size=258, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, attention="gqa"
    )
    recipe = Recipe(run=RunConfig(name="left"), model=model)
    run = RunDir.named("left", tmp_path)
    run.create()
    stop = StopRequest()
    try:
        with pytest.raises(Stopped), stop.at_once():
            load_run_data(recipe, run, Hooks(), trained=False)
    finally:
        stop.restore()
    (left,) = (thread for thread in threading.enumerate() if thread.name == "interruptible")
    before = sorted(tmp_path.rglob("*"))
    go_on.set()
    left.join(30)
    assert not left.is_alive()
    assert sorted(tmp_path.rglob("*")) == before
    assert not run.tokenizer.exists()
