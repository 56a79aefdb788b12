"""Byte-level BPE, trained on the text or given; and documents as the token ids it makes of them.

A tokenizer lives in a folder as Hugging Face's libraries keep it: `tokenizer.json`, and beside it
`tokenizer_config.json`, which names the end-of-text token.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.errors import DataError
from moe.rundir import write_json

__all__ = ["END_OF_TEXT", "DocumentEncoder", "copy_tokenizer", "end_token_of", "tokenizer_file", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"  # of tokenizers trained here: id 0
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")

_PIECE = 1 << 20  # characters of a document encoded at once: an encoding takes some hundred times its tokens
_GROUP = 1 << 22  # characters encoded by all cores together


class DocumentEncoder:
    """The tokenizer at `file` and the token that ends a document.

    `size` is one more than its largest id, `end_token` the id of the end token, `dtype` the smallest that holds every
    id, `sha256` the hash of the file. Raises DataError when the file is no tokenizer or names no end token.
    """

    def __init__(self, file: Path, end_token: str | None = None) -> None:
        self.file = file
        self._tokenizer = _loaded(file)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # text that spells a special token is text
        vocabulary = self._tokenizer.get_vocab()
        name = end_token or end_token_of(file, vocabulary)
        if name not in vocabulary:
            raise DataError(f"data.end_token={name!r} is not a token of {file}; name one that is")
        self.end_token: int = vocabulary[name]
        self.size: int = max(vocabulary.values()) + 1
        self.dtype: np.dtype[Any] = np.dtype("<u2" if self.size <= 1 << 16 else "<u4")
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()

    def encode(self, documents: Iterable[str]) -> Iterator[NDArray[Any]]:
        """Each document's ids, ended by the end token; an empty array for one without tokens."""
        for group in _groups(documents):
            pieces = [_pieces(text) for text in group]
            encodings = iter(
                self._tokenizer.encode_batch_fast(
                    [part for parts in pieces for part in parts], add_special_tokens=False
                )
            )
            for parts in pieces:
                ids = [token for _ in parts for token in next(encodings).ids]
                yield np.asarray([*ids, self.end_token] if ids else [], dtype=self.dtype)


def train_tokenizer(documents: Iterable[str], vocab_size: int, file: Path) -> None:
    """Train byte-level BPE of exactly `vocab_size` tokens and save it. Raises DataError when the text yields fewer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(f"model.vocab_size={vocab_size} must exceed {len(alphabet)}: every byte is a token")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is more than this corpus yields ({tokenizer.get_vocab_size()}); lower it"
        )
    _save(tokenizer.to_str(pretty=True).encode(), END_OF_TEXT, file)


def copy_tokenizer(source: Path, end_token: str | None, file: Path) -> None:
    """Keep the tokenizer at `source` as `file`. Raises DataError when it cannot be used."""
    name = end_token or end_token_of(source, _loaded(source).get_vocab())
    _save(source.read_bytes(), name, file)


def tokenizer_file(place: str | Path) -> Path:
    """The file that data.tokenizer means: itself, or tokenizer.json in a folder."""
    return Path(place, "tokenizer.json") if Path(place).is_dir() else Path(place)


def end_token_of(file: Path, vocabulary: Iterable[str]) -> str:
    """The end token the tokenizer at `file` names in its tokenizer_config.json, or one of the customary names.

    Raises DataError when there is neither.
    """
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError):
            raise DataError(f"{config} is not a tokenizer's configuration; restore it, or remove it") from None
        named = named.get("content") if isinstance(named, dict) else named
        if named:
            return str(named)
    for name in _KNOWN_ENDS:
        if name in vocabulary:
            return name
    raise DataError(f"{file} names no end-of-text token; name it with data.end_token")


def _loaded(file: Path) -> Tokenizer:
    if not file.is_file():
        raise DataError(f"{file} does not exist; give data.tokenizer a tokenizer.json, or a folder that holds one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every kind of bad file
        raise DataError(f"{file} is not a tokenizer ({error}); restore it, or delete it to train it again") from None


def _save(tokenizer: bytes, end_token: str, file: Path) -> None:
    """Both files, the tokenizer last: where it is, the other is."""
    config = {"eos_token": end_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(file.with_name("tokenizer_config.json"), config)
    aside = file.with_name(f".{file.name}")
    aside.write_bytes(tokenizer)
    aside.replace(file)


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    waiting = 0
    for text in documents:
        group.append(text)
        waiting += len(text)
        if waiting >= _GROUP:
            yield group
            group, waiting = [], 0
    if group:
        yield group


def _pieces(text: str) -> list[str]:
    """The text in pieces of at most _PIECE characters, cut after a line's end where there is one."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        line_end = text.rfind("\n", start, start + _PIECE) + 1
        cut = line_end if line_end > start else start + _PIECE
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]
