"""A run's text is tokenised once: by one rank, and not again when the run goes on."""

import dataclasses
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from moe.config import DataConfig
from moe.data import Sequences
from moe.data.shards import PreparedFolder
from moe.data.sources import open_source
from moe.data.tokenizer import DocumentEncoder
from moe.data.tokens import joint_sha256, tokenise_split
from moe.errors import ConfigError
from moe.rundir import RunDir
from moe.trainer import Hooks
from moe.trainer.data import load_run_data

from .conftest import Place
from .tiny_recipe import RECIPE

DOCUMENTS = 300
RECIPE_FILE = "tokenising_recipe.py"
WORDS = ("data.source=rows.jsonl", "train.max_steps=6")


@pytest.fixture(scope="module", autouse=True)
def rows(place: Place) -> Path:
    """Documents to tokenise one by one."""
    chance = random.Random(1)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(chance.choices(words, k=60)) for _ in range(DOCUMENTS)]
    file = place.folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def straight(place: Place, rows: Path) -> RunDir:
    """The run `straight`: one process, nothing in its way."""
    done = place.python("run.name=straight", *WORDS, recipe=RECIPE_FILE)
    assert done.returncode == 0, done.stderr
    return RunDir(place.run("straight"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_rank_tokenises(place: Place, straight: RunDir, tmp_path: Path) -> None:
    """Of two: every document once, and both read what one process would have: facts, tokens, losses."""
    environment = {"ENCODED": str(tmp_path / "encoded")}
    done = place.launch("run.name=pair", *WORDS, recipe=RECIPE_FILE, ranks=2, environment=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "encoded").read_text().split() == ["0"] * DOCUMENTS
    pair = RunDir(place.run("pair"))
    assert pair.read_json(pair.data) == straight.read_json(straight.data)
    assert contents(pair.tokens) == contents(straight.tokens)
    assert place.losses("pair") == pytest.approx(place.losses("straight"), rel=1e-5)


def test_a_killed_start_leaves_nothing_in_the_way(place: Place, straight: RunDir, tmp_path: Path) -> None:
    """kill -9 amid the documents: the next start makes all of them, removes what was left, and trains alike."""
    encoded = tmp_path / "encoded"
    (*_, recipe, word), environment = place.command("run.name=killed", recipe=RECIPE_FILE)
    environment = {**environment, "ENCODED": str(encoded), "SLOW": "0.02"}
    child = place.popen([sys.executable, recipe, word, *WORDS], environment)
    while not encoded.is_file() or len(encoded.read_text().split()) < DOCUMENTS // 4:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    child.kill()
    child.communicate()
    run = RunDir(place.run("killed"))
    (left,) = run.root.glob(".making_*")
    assert list(left.rglob("*.bin"))
    assert not run.tokens.exists()

    again = place.python("run.name=killed", *WORDS, recipe=RECIPE_FILE)
    assert again.returncode == 0, again.stderr
    assert not list(run.root.glob(".making_*"))
    assert contents(run.tokens) == contents(straight.tokens)
    assert place.losses("killed") == place.losses("straight")


def test_a_full_disk(place: Place, straight: RunDir) -> None:
    """One sentence for both ranks, nothing left behind; the same command goes on once there is room."""
    words = ("run.name=full", *WORDS)
    done = place.launch(*words, recipe=RECIPE_FILE, ranks=2, environment={"ROOM": "20000"})
    assert done.returncode != 0
    sentence = (
        "error: the tokens of data.source='rows.jsonl' cannot be written to runs/full/tokens/0 (File too large); they "
        "take two to four bytes each: mend that, or make room, and the same command goes on"
    )
    assert done.stderr.count("error: ") == done.stderr.count(sentence) == 1
    assert "gloo" not in done.stderr
    assert not list(place.run("full").glob(".making_*"))
    again = place.python(*words, recipe=RECIPE_FILE)
    assert again.returncode == 0, again.stderr
    assert place.losses("full") == place.losses("straight")


def test_ranks_that_share_no_folder(place: Place) -> None:
    """One sentence, which names the rank that does not see what the first has made."""
    done = place.launch("run.name=apart", *WORDS, recipe=RECIPE_FILE, ranks=2, environment={"APART": "1"})
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "error: rank 1 does not see the run directory runs0/apart, which the first has made; run.dir" in done.stderr


class Counted:
    """Documents that were tokenised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.documents = 0
        encode = DocumentEncoder.encode

        def counted(encoder: DocumentEncoder, documents: Iterable[str]) -> Iterator[NDArray[Any]]:
            for ids in encode(encoder, documents):
                self.documents += 1
                yield ids

        monkeypatch.setattr(DocumentEncoder, "encode", counted)


def test_going_on_tokenises_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again it does only where tokens are missing or damaged, or the text is another, and then a trained run refuses.

    The sequences are those of tokens held in memory.
    """
    text = tmp_path / "text.jsonl"
    text.write_bytes(rows.read_bytes())
    config = DataConfig(source=str(text), validation_fraction=0.1)
    recipe = dataclasses.replace(RECIPE, data=config)
    run, counted = RunDir(tmp_path / "run"), Counted(monkeypatch)
    run.create()
    first = load_run_data(recipe, run, Hooks(), trained=False)
    assert counted.documents == DOCUMENTS
    source, encoder = open_source(str(text), config), DocumentEncoder(run.tokenizer)
    train, validation = (tokenise_split("", source.documents(split), encoder) for split in ("train", "validation"))
    assert torch.equal(first.train.batch(0, 500), Sequences(train.tokens, 32, 0).batch(0, 500))
    assert torch.equal(first.validation.batch(0, 20), Sequences(validation.tokens, 32, None).batch(0, 20))
    assert first.facts.corpus_sha256 == joint_sha256((train.sha256, validation.sha256))
    counted.documents = 0

    def tokenised(trained: bool = True) -> int:
        before = counted.documents
        again = load_run_data(recipe, run, Hooks(), trained=trained)
        assert again.facts == first.facts
        assert torch.equal(again.train.batch(3, 50), first.train.batch(3, 50))
        return counted.documents - before

    assert tokenised() == 0
    assert tokenised(trained=False) == 0, "the tokenizer, trained again, is the same"
    shard = run.tokens / "0" / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\1")
    assert tokenised() == DOCUMENTS
    shard.unlink()
    assert tokenised() == DOCUMENTS
    assert tokenised() == 0
    assert PreparedFolder(run.tokens / "0").index["settings"]["sources"] == [str(text)]

    text.write_text(text.read_text().replace(" e", " E"))
    with pytest.raises(
        ConfigError, match=r"corpus_sha256 is .*, but run 'tiny' was trained with .*; restore that text"
    ):
        load_run_data(recipe, run, Hooks(), trained=True)
    text.write_bytes(rows.read_bytes())
    assert tokenised() == DOCUMENTS


def test_a_mixture_keeps_each_sources_tokens(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one text of two is another, that one is tokenised again."""
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for file in files:
        file.write_bytes(rows.read_bytes())
    config = DataConfig(source=f"{files[0]},{files[1]}", weights=(1, 1), validation_fraction=0.1)
    recipe = dataclasses.replace(RECIPE, data=config)
    run, counted = RunDir(tmp_path / "run"), Counted(monkeypatch)
    run.create()
    load_run_data(recipe, run, Hooks(), trained=False)
    assert counted.documents == 2 * DOCUMENTS
    with files[1].open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(ConfigError, match="corpus_sha256 is"):
        load_run_data(recipe, run, Hooks(), trained=True)
    assert counted.documents == 3 * DOCUMENTS + 1
