"""Tokenizers: trained ones are lossless and repeatable, saved ones taken as they are, unfit ones one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from moe.data.tokenizer import END_OF_TEXT, DocumentEncoder, copy_tokenizer, tokenizer_file, train_tokenizer
from moe.errors import DataError

from .conftest import documents

TEXTS = documents(50)


def saved(folder: Path, end: str, **config: object) -> Path:
    """A small word tokenizer as others save theirs: with truncation, padding and a start token."""
    words = ["[START]", end, "one", "two", "three", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[START]", end])
    tokenizer.post_processor = processors.TemplateProcessing(single="[START] $A", special_tokens=[("[START]", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_training_is_repeatable_and_tokens_lossless(tmp_path: Path) -> None:
    """The same text trains the same file; tokens decode to the very text; each document ends with the end token."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    train_tokenizer(TEXTS, 400, first)
    train_tokenizer(iter(TEXTS), 400, second)
    assert first.read_bytes() == second.read_bytes()
    encoder = DocumentEncoder(first)
    assert (encoder.size, encoder.end_token, encoder.dtype) == (400, 0, np.dtype("<u2"))
    plain = Tokenizer.from_file(str(first))
    for text, ids in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        assert ids[-1] == encoder.end_token
        assert plain.decode(ids[:-1].tolist()) == text


def test_documents_without_tokens_leave_nothing(tokenizer: Path) -> None:
    """An empty document has not even an end token."""
    lengths = [len(ids) for ids in DocumentEncoder(tokenizer).encode(["a", "", "b"])]
    assert lengths == [2, 0, 2]
    assert list(DocumentEncoder(tokenizer).encode([])) == []


def test_text_that_spells_the_end_token_does_not_end_a_document(tokenizer: Path) -> None:
    """Only documents end documents, whatever their text says."""
    encoder = DocumentEncoder(tokenizer)
    (ids,) = encoder.encode([f"one{END_OF_TEXT}two"])
    assert ids.tolist().count(encoder.end_token) == 1
    assert Tokenizer.from_file(str(tokenizer)).decode(ids[:-1].tolist()) == f"one{END_OF_TEXT}two"


def test_long_documents_are_encoded_in_pieces(tokenizer: Path) -> None:
    """A document of millions of characters is still one, and its text is whole; lines or none."""
    encoder, plain = DocumentEncoder(tokenizer), Tokenizer.from_file(str(tokenizer))
    for text in ("".join(TEXTS) * 250, "ab" * 1_100_000):
        assert len(text) > 2 << 20
        (ids,) = encoder.encode([text])
        assert np.count_nonzero(ids == encoder.end_token) == 1
        assert plain.decode(ids[:-1].tolist()) == text


def test_a_saved_tokenizer_gives_a_document_and_nothing_else(tmp_path: Path) -> None:
    """Its truncation, padding and start token are for other uses; its end token is found."""
    encoder = DocumentEncoder(saved(tmp_path / "eos", "</s>"))
    (ids,) = encoder.encode(["one two three two"])
    assert ids.tolist() == [2, 3, 4, 3, 1]
    assert encoder.size == 6


def test_the_end_token_is_named_by_the_tokenizer_or_by_the_user(tmp_path: Path) -> None:
    """tokenizer_config.json names it, as text or as an object; data.end_token wins; else the sentence asks for it."""
    assert DocumentEncoder(saved(tmp_path / "a", "[STOP]", eos_token="[STOP]")).end_token == 1
    assert DocumentEncoder(saved(tmp_path / "b", "[STOP]", eos_token={"content": "[STOP]"})).end_token == 1
    nameless = saved(tmp_path / "c", "[STOP]")
    assert DocumentEncoder(nameless, "[STOP]").end_token == 1
    with pytest.raises(DataError, match=r"names no end-of-text token; name it with data\.end_token"):
        DocumentEncoder(nameless)
    with pytest.raises(DataError, match=r"data\.end_token='\[NONE\]' is not a token of .*; name one that is"):
        DocumentEncoder(nameless, "[NONE]")
    copy_tokenizer(nameless, "[STOP]", tmp_path / "tokenizer.json")
    assert DocumentEncoder(tmp_path / "tokenizer.json").end_token == 1, "the copy knows what the user named"
    assert (tmp_path / "tokenizer.json").read_bytes() == nameless.read_bytes()
    assert tokenizer_file(tmp_path) == tmp_path / "tokenizer.json" == tokenizer_file(tmp_path / "tokenizer.json")


def test_unfit_tokenizers_are_one_sentence(tmp_path: Path) -> None:
    """Too small a text, too small a vocabulary, no tokenizer; nothing is left behind."""
    file = tmp_path / "t.json"
    with pytest.raises(DataError, match=r"model\.vocab_size=5000 is more than this corpus yields"):
        train_tokenizer(["aaab"], 5000, file)
    with pytest.raises(DataError, match=r"model\.vocab_size=100 must exceed 256"):
        train_tokenizer(["aaab"], 100, file)
    assert not list(tmp_path.iterdir())
    file.write_text("{")
    with pytest.raises(DataError, match="is not a tokenizer"):
        DocumentEncoder(file)
    with pytest.raises(DataError, match=r"does not exist; give data\.tokenizer"):
        copy_tokenizer(tmp_path / "none.json", None, tmp_path / "out.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    train_tokenizer(TEXTS, 300, tmp_path / "sub.json")  # replaces the configuration beside it
    assert DocumentEncoder(tmp_path / "sub.json").end_token == 0
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="is not a tokenizer's configuration"):
        DocumentEncoder(tmp_path / "sub.json")
