"""From the section `data` to sequences: ranks agree, sources mix, the tokenizer is the right one, misfits are told."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch

from moe.config import DataConfig
from moe.data import (
    Mixture,
    Sampling,
    Sequences,
    TrainingData,
    load_data,
    make_tokenizer,
    open_encoder,
    open_sources,
    own_texts,
)
from moe.data.prepare import prepare
from moe.data.run_tokens import tokenise
from moe.errors import ConfigError, DataError

from .conftest import documents, write_jsonl

TEXTS = documents(120)


def load(config: DataConfig, folder: Path, vocab_size: int = 300, **sampling: int) -> TrainingData:
    """As the trainer does: the tokenizer into the run's folder, the tokens, of each call its own, then the data."""
    sources, file = open_sources(config), folder / "run" / "tokenizer.json"
    file.parent.mkdir(exist_ok=True)
    make_tokenizer(sources, config, vocab_size, file)
    encoder, tokens = open_encoder(file, vocab_size), Path(tempfile.mkdtemp(dir=folder))
    for source, place in own_texts(sources, config, tokens):
        tokenise(source, encoder, place)
    return load_data(sources, config, encoder, tokens, Sampling(**{"seq_len": 32, "seed": 5, **sampling}))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "rows.jsonl", TEXTS))


@pytest.fixture
def shards(rows: str, tokenizer: Path, tmp_path: Path) -> str:
    """The rows as a prepared folder."""
    prepare(DataConfig(source=rows, tokenizer=str(tokenizer)), tmp_path / "shards", shard_tokens=1000)
    return str(tmp_path / "shards")


def test_a_prepared_folder_is_the_text_it_was_made_of(rows: str, shards: str, tmp_path: Path, tokenizer: Path) -> None:
    """The same sequences, and hashes by which `moe compare` knows the same validation text and tokenizer."""
    text = load(DataConfig(source=rows, tokenizer=str(tokenizer)), tmp_path)
    prepared = load(DataConfig(source=shards), tmp_path)
    assert torch.equal(text.train.batch(0, 500), prepared.train.batch(0, 500))
    same = {"source": shards, "corpus_sha256": prepared.facts.corpus_sha256}
    assert dataclasses.replace(text.facts, **same) == prepared.facts
    assert prepared.facts.corpus_sha256 != text.facts.corpus_sha256, "that of a prepared folder covers its shards"
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_any_number_of_ranks_sees_the_same_sequences(rows: str, shards: str, tmp_path: Path) -> None:
    """A run that goes on with 4 ranks after 1, then with 2, has the same batches, of text, shards or both."""
    for source, weights in ((shards, ()), (f"{rows},{shards}", (1.0, 3.0))):
        config = DataConfig(source=source, weights=weights)
        whole = load(config, tmp_path).train.batch(0, 96)
        seen = []
        for step, ranks in enumerate((1, 4, 2) * 4):
            share = 8 // ranks
            for rank in range(ranks):
                data = load(config, tmp_path, rank=rank, ranks=ranks)
                seen.append(data.train.batch(step * 8 + rank * share, share))
        assert torch.equal(torch.cat(seen), whole)


def test_a_mixture_is_trained_and_evaluated_in_its_shares(rows: str, tmp_path: Path) -> None:
    """Three quarters of the sequences are of the second source; each split's hash depends on shares and sources."""
    other = str(write_jsonl(tmp_path / "other.jsonl", documents(200, seed=1)))
    config = DataConfig(source=f"{rows}, {other}", weights=(1, 3))
    data = load(config, tmp_path)
    alone = load(DataConfig(source=rows, tokenizer=str(tmp_path / "run")), tmp_path)
    assert isinstance(data.validation, Mixture)
    assert isinstance(alone.validation, Sequences)
    mixed = data.train.batch(0, 400)
    own = {tuple(row) for row in alone.train.batch(0, len(alone.train)).tolist()}  # type: ignore[arg-type]
    assert sum(tuple(row) in own for row in mixed.tolist()) == 100
    assert data.facts.validation_bytes == pytest.approx(data.facts.validation_tokens * 1.9, rel=0.5)
    swapped = load(DataConfig(source=config.source, weights=(3, 1)), tmp_path)
    scaled = load(DataConfig(source=config.source, weights=(10, 30)), tmp_path)
    assert scaled.facts == data.facts
    for name in ("corpus_sha256", "train_sha256", "validation_sha256"):
        assert len({getattr(facts, name) for facts in (data.facts, alone.facts, swapped.facts)}) == 3


def test_the_vocabulary_may_be_padded_and_not_cut(rows: str, tmp_path: Path, tokenizer: Path) -> None:
    """A saved tokenizer may have fewer tokens than the model, never more."""
    given = DataConfig(source=rows, tokenizer=str(tokenizer))
    assert load(given, tmp_path, vocab_size=320).facts.vocab_size == 300
    with pytest.raises(DataError, match=r"model\.vocab_size=299 is less than the 300 tokens of .*; set .*=300, or"):
        load(given, tmp_path, vocab_size=299)
    with pytest.raises(DataError, match=r"does not exist; give data\.tokenizer"):
        load(DataConfig(source=rows, tokenizer=str(tmp_path / "none.json")), tmp_path)


def test_shards_of_another_tokenizer_are_refused(rows: str, shards: str, tmp_path: Path) -> None:
    """Tokens of two tokenizers do not mix."""
    prepare(DataConfig(source=rows), tmp_path / "second", vocab_size=290)
    config = DataConfig(source=f"{shards},{tmp_path / 'second'}", weights=(1, 1))
    with pytest.raises(DataError, match=r"second' was prepared with another tokenizer than the run's; prepare all"):
        load(config, tmp_path)


def test_more_is_asked_than_the_data_holds(rows: str, tmp_path: Path) -> None:
    """A sequence longer than the validation text, a corpus too small for the vocabulary."""
    with pytest.raises(ConfigError, match=r"train\.seq_len=100000 exceeds the data"):
        load(DataConfig(source=rows), tmp_path, seq_len=100_000)
    with pytest.raises(DataError, match=r"model\.vocab_size=50000 is more than this corpus yields"):
        load(DataConfig(source=rows), tmp_path, vocab_size=50_000)


@pytest.mark.parametrize(
    ("source", "weights", "complaint"),
    [
        ("a,b", (), r"data\.weights=\(\) must give one number for each of the 2 sources of data\.source"),
        ("a,b", (1.0,), r"data\.weights=\(1\.0,\) must give one number for each of the 2 sources"),
        ("a", (1.0, 2.0), r"must give one number for each of the 1 sources"),
        ("a,b", (1.0, 0.0), r"data\.weights=0\.0 must be above 0"),
        ("a,b", (1.0, -1.0), r"data\.weights=-1\.0 must be above 0"),
        (" ,", (), r"data\.source=' ,' names no source"),
    ],
)
def test_weights_fit_their_sources(source: str, weights: tuple[float, ...], complaint: str) -> None:
    """One positive number a source."""
    with pytest.raises(ConfigError, match=complaint):
        DataConfig(source=source, weights=weights)
