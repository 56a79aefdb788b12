"""Data: the corpus is real and split by file; a batch is a function of seed and number alone; bad data is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moe.config import DataConfig
from moe.data import Corpus, Sequences, load_corpus, prepare
from moe.data.sequences import document_ids
from moe.data.stdlib import TRAIN_MODULES, VALIDATION_MODULES
from moe.data.tokens import END_OF_TEXT, train_tokenizer
from moe.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(DataConfig())


def test_the_standard_library_is_a_corpus(corpus: Corpus) -> None:
    """Megabytes of source and prose; no file on both sides; the hash is that of the text."""
    assert sum(map(len, corpus.train)) > 5_000_000
    assert 100_000 < sum(map(len, corpus.validation)) < 1_000_000
    assert not set(corpus.train) & set(corpus.validation)
    assert not set(TRAIN_MODULES) & set(VALIDATION_MODULES)
    assert len(set(TRAIN_MODULES)) == len(TRAIN_MODULES)
    assert corpus.sha256 == load_corpus(DataConfig()).sha256
    changed = Corpus(corpus.source, corpus.train, (*corpus.validation[:-1], corpus.validation[-1] + " "))
    assert changed.sha256 != corpus.sha256


def test_tokenizing_is_lossless_and_repeatable(corpus: Corpus, tmp_path: Path) -> None:
    """Byte-level tokens decode to the very text, documents end in END_OF_TEXT, and training twice gives one file."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    train_tokenizer(corpus, 512, first)
    train_tokenizer(corpus, 512, second)
    assert first.read_bytes() == second.read_bytes()
    data = prepare(corpus, first, 512)
    assert data.facts.train_tokens == len(data.train)
    assert data.facts.validation_bytes == sum(len(text.encode()) for text in corpus.validation)
    assert int(data.validation.max()) < 512
    tokenizer = Tokenizer.from_file(str(first))
    end = tokenizer.token_to_id(END_OF_TEXT)
    cuts = np.flatnonzero(data.validation == end)
    assert len(cuts) == len(corpus.validation)
    assert tokenizer.decode(data.validation[: cuts[0]].tolist()) == corpus.validation[0]


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    """However the stream is cut into batches and ranks, sequence n is the same; each epoch serves every row once."""
    tokens = np.arange(50 * 4 + 3, dtype=np.int32)
    whole = Sequences(tokens, 4, seed=7).batch(0, 120)
    for ranks in (1, 2, 4):
        share = 120 // ranks
        parts = [Sequences(tokens, 4, seed=7).batch(rank * share, share) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    backwards = Sequences(tokens, 4, seed=7)
    assert torch.equal(backwards.batch(110, 10), whole[110:])
    assert torch.equal(backwards.batch(0, 10), whole[:10])
    first, second = whole[:50, 0].tolist(), whole[50:100, 0].tolist()
    assert sorted(first) == sorted(second) == list(range(0, 200, 4))
    assert first != second
    assert not torch.equal(Sequences(tokens, 4, seed=8).batch(0, 50), whole[:50])
    assert torch.equal(Sequences(tokens, 4, seed=None).batch(0, 50).flatten(), torch.arange(200))


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    """The same files are held out wherever the folder lies; hidden files and folders are not text."""
    for copy in ("a", "b"):
        for number in range(20):
            file = tmp_path / copy / f"part{number % 3}" / f"{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"document {number}\n", encoding="utf-8")
        (tmp_path / copy / ".hidden").write_bytes(b"\xff")
        (tmp_path / copy / ".git").mkdir()
        (tmp_path / copy / ".git" / "index").write_bytes(b"\xff")
    one, two = (load_corpus(DataConfig(source=str(tmp_path / copy), validation_fraction=0.2)) for copy in ("a", "b"))
    assert (len(one.train), len(one.validation)) == (16, 4)
    assert one.sha256 == two.sha256


def test_a_file_is_cut_in_two(tmp_path: Path) -> None:
    """One text file: its end is held out."""
    file = tmp_path / "text"
    file.write_text("ab" * 500, encoding="utf-8")
    corpus = load_corpus(DataConfig(source=str(file), validation_fraction=0.1))
    assert corpus.train[0] + corpus.validation[0] == "ab" * 500
    assert len(corpus.validation[0]) == 100


def test_bad_data_is_one_sentence(tmp_path: Path) -> None:
    """Missing, empty, not UTF-8, too small for the vocabulary, another vocabulary, too short for one sequence."""
    with pytest.raises(DataError, match=r"does not exist; give stdlib, a text file or a folder"):
        load_corpus(DataConfig(source=str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="leaves the training split without text"):
        load_corpus(DataConfig(source=str(tmp_path / "empty")))
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_corpus(DataConfig(source=str(tmp_path / "latin")))
    tiny = Corpus("tiny", ("aaab",), ("ab",))
    with pytest.raises(DataError, match=r"model\.vocab_size=5000 is more than this corpus yields"):
        train_tokenizer(tiny, 5000, tmp_path / "t.json")
    with pytest.raises(DataError, match=r"model\.vocab_size=100 must exceed 256"):
        train_tokenizer(tiny, 100, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
    train_tokenizer(tiny, 258, tmp_path / "t.json")
    with pytest.raises(DataError, match=r"model\.vocab_size=300 but .* has 258 tokens"):
        prepare(tiny, tmp_path / "t.json", 300)
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not a tokenizer"):
        prepare(tiny, tmp_path / "bad.json", 300)
    with pytest.raises(ConfigError, match=r"train\.seq_len=64 exceeds the data \(10 tokens\)"):
        Sequences(np.arange(10, dtype=np.int32), 64, seed=0)


def test_a_document_ends_with_its_end_token() -> None:
    """The end token belongs to the document it ends; two in a row are an empty document."""
    ids = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 1, 1, 1, 1, 1]])
    assert document_ids(ids, 0).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
