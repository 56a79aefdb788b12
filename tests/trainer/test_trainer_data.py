"""A run's data: facts and tokenizer are kept with the run, and it goes on with the same data or not at all."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.config import DataConfig, Recipe, parse_overrides
from moe.data import Sampling, TrainingData, data_from_tokens
from moe.data.prepare import prepare
from moe.errors import ConfigError, DataError
from moe.rundir import RunDir
from moe.trainer import Hooks, train
from moe.trainer.data import load_run_data

from .conftest import Place
from .tiny_recipe import RECIPE


def recipe_for(source: Path, **fields: object) -> Recipe:
    return dataclasses.replace(RECIPE, data=DataConfig(source=str(source), **fields))  # type: ignore[arg-type]


@pytest.fixture
def shards(place: Place, tmp_path: Path) -> Path:
    """The text of the tiny runs, prepared."""
    prepare(DataConfig(source=str(place.folder / "text")), tmp_path / "shards", vocab_size=300, shard_tokens=5000)
    return tmp_path / "shards"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def test_a_run_goes_on_with_the_same_shards_only(shards: Path, run: RunDir) -> None:
    """The shards' tokenizer is the run's; a damaged shard, and a folder prepared anew from other text, are refused."""
    data = load_run_data(recipe_for(shards), run, Hooks(), trained=False)
    assert run.tokenizer.read_bytes() == (shards / "tokenizer.json").read_bytes()
    assert run.read_json(run.data) == data.facts.to_dict()
    again = load_run_data(recipe_for(shards), run, Hooks(), trained=True)
    assert torch.equal(again.train.batch(7, 9), data.train.batch(7, 9))

    shard = shards / "train_00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + b"\1\1")
    with pytest.raises(DataError, match=r"train_00000\.bin is not what was prepared"):
        load_run_data(recipe_for(shards), run, Hooks(), trained=True)
    shard.write_bytes(whole)

    other = shards.with_name("text")
    other.write_text("some other text altogether. " * 400)
    prepare(DataConfig(source=str(other), tokenizer=str(shards)), shards.with_name("other"), shard_tokens=5000)
    with pytest.raises(ConfigError, match=r"corpus_sha256 is .*, but run 'tiny' was trained with .*; restore"):
        load_run_data(recipe_for(shards.with_name("other")), run, Hooks(), trained=True)


def test_a_saved_tokenizer_is_the_runs(place: Place, shards: Path, run: RunDir) -> None:
    """It is copied with its end token's name, and a run goes on with its copy though the original is gone."""
    given = recipe_for(place.folder / "text", tokenizer=str(shards), end_token="e")
    data = load_run_data(given, run, Hooks(), trained=False)
    vocabulary = json.loads(run.tokenizer.read_text())["model"]["vocab"]
    assert data.end_token == vocabulary["e"]
    for file in shards.iterdir():
        file.unlink()
    again = load_run_data(given, run, Hooks(), trained=True)
    assert (again.facts, again.end_token) == (data.facts, data.end_token)


def test_a_run_trains_from_shards(place: Place, shards: Path) -> None:
    """Launched as people do: the losses of the text itself, bit for bit, and hashes that let the two be compared."""
    for name, source in (("from_text", "text"), ("from_shards", str(shards))):
        words = (f"data.source={source}", "data.validation_fraction=0.05", "train.max_steps=10")
        done = place.python(f"run.name={name}", *words)
        assert done.returncode == 0, done.stderr
    assert place.losses("from_text") == place.losses("from_shards") != {}
    one, two = (json.loads((place.run(name) / "data.json").read_text()) for name in ("from_text", "from_shards"))
    for fact in ("validation_sha256", "tokenizer_sha256", "train_sha256", "validation_tokens"):
        assert one[fact] == two[fact]


def test_a_hook_brings_its_own_tokens(place: Place) -> None:
    """No text, no tokenizer: arrays of a hook's own, whose hashes a resumed run must find again."""
    words = ("run.name=own", "data.source=nowhere", "train.max_steps=6", "train.checkpoint_every_steps=3")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"TOKENS": "1"})
    assert done.returncode == 0, done.stderr
    facts = json.loads((place.run("own") / "data.json").read_text())
    assert (facts["source"], facts["train_tokens"], facts["validation_tokens"]) == ("counting", 4000, 1000)
    losses = place.losses("own")
    assert losses[6] < losses[1]
    other = place.python(*words, "train.max_steps=8", recipe="hooked_recipe.py", environment={"TOKENS": "2"})
    assert other.returncode == 2
    assert "train_sha256 is" in other.stderr or "corpus_sha256 is" in other.stderr
    same = place.python(*words, "train.max_steps=8", recipe="hooked_recipe.py", environment={"TOKENS": "1"})
    assert same.returncode == 0, same.stderr


class OwnTokens(Hooks):
    """Ids of a hook's own, below `vocab_size` as the hook has it; `spoil` puts one in that is not."""

    def __init__(self, vocab_size: int = 300, spoil: str = "") -> None:
        self.vocab_size, self.spoil = vocab_size, spoil

    def data(self, recipe: Recipe, sampling: Sampling) -> TrainingData:
        tokens = np.arange(5000) % 300
        made = data_from_tokens(
            "own", tokens[:4000], tokens[4000:], sampling, vocab_size=self.vocab_size, end_token=0, validation_bytes=9
        )
        if self.spoil == "array":
            tokens[3000] = 300
        if self.spoil == "negative":
            tokens[4100] = -1
        return made


@pytest.mark.parametrize(
    ("hooks", "error", "sentence"),
    [
        (OwnTokens(vocab_size=299), DataError, "own: token ids go from 0 to 299, not from 0 to 298; make them with"),
        (OwnTokens(vocab_size=400), ConfigError, "model.vocab_size=300 is less than the 400 tokens of the data"),
        (OwnTokens(spoil="array"), DataError, "to 300, not from 0 to 299; make them with the tokenizer of the model's"),
        (OwnTokens(spoil="negative"), DataError, "own: token ids go from -1 to 227, not from 0 to 299; make them with"),
    ],
    ids=["by the hook's own size", "by the model's size", "while training", "while evaluating"],
)
def test_ids_the_model_does_not_have_are_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, hooks: Hooks, error: type[Exception], sentence: str
) -> None:
    """Whatever made them and whenever they come: one sentence, where an embedding would have raised an IndexError."""
    monkeypatch.chdir(place.folder)
    with pytest.raises(error) as caught:
        train(parse_overrides(RECIPE, ["run.name=foreign", "train.resume=never"]), hooks=hooks)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(place.run("foreign"))
