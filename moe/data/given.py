"""Tokens of one's own, already made: what a hook returns instead of `data.source`, and that they are the model's."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe.data.load import Sampling, TrainingData
from moe.data.sequences import SequenceReader, Sequences
from moe.data.tokens import DataFacts, joint_sha256
from moe.errors import DataError

__all__ = ["WithinVocabulary", "data_from_tokens"]


def data_from_tokens(
    name: str,
    train: NDArray[np.integer],
    validation: NDArray[np.integer],
    sampling: Sampling,
    *,
    vocab_size: int,
    end_token: int,
    validation_bytes: int,
) -> TrainingData:
    """Training and validation sequences of one-dimensional arrays of token ids below `vocab_size`.

    Runs on the same arrays are on the same data: their hashes stand for text and tokenizer. `validation_bytes` is the
    length of the validation text, for bits per byte; `end_token` ends a document.

    Raises ConfigError when there is not one whole sequence in either, DataError for an id that is not below
    `vocab_size`.
    """
    for tokens in (train, validation):
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise _outside(name, tokens.min(), tokens.max(), vocab_size)
    hashes = [hashlib.sha256(tokens.astype(np.int64).tobytes()).hexdigest() for tokens in (train, validation)]
    facts = DataFacts(
        source=name,
        corpus_sha256=joint_sha256(hashes),
        train_sha256=hashes[0],
        validation_sha256=hashes[1],
        tokenizer_sha256=hashes[1],
        vocab_size=vocab_size,
        train_tokens=len(train),
        validation_tokens=len(validation),
        validation_bytes=validation_bytes,
    )
    return TrainingData(
        Sequences(train, sampling.seq_len, sampling.seed),
        Sequences(validation, sampling.seq_len, None),
        facts,
        end_token,
    )


class WithinVocabulary:
    """The sequences of `reader`, whose token ids must be below `vocab_size`: `name` says whose they are.

    The model would answer another id with an IndexError, and on a GPU with a fault that ends the process.
    """

    def __init__(self, reader: SequenceReader, name: str, vocab_size: int) -> None:
        self._reader, self._name, self._vocab_size = reader, name, vocab_size

    def __len__(self) -> int:
        return len(self._reader)  # type: ignore[arg-type]  # of validation, which is counted

    def batch(self, first: int, size: int) -> Tensor:
        """As `reader` gives it. Raises DataError for an id that is not one of the vocabulary."""
        ids = self._reader.batch(first, size)
        low, high = (int(bound) for bound in ids.aminmax())
        if not 0 <= low <= high < self._vocab_size:
            raise _outside(self._name, low, high, self._vocab_size)
        return ids

    def state(self) -> dict[str, Any]:
        return self._reader.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._reader.restore(state)


def _outside(name: str, low: int, high: int, vocab_size: int) -> DataError:
    return DataError(
        f"{name}: token ids go from {low} to {high}, not from 0 to {vocab_size - 1}; make them with the tokenizer of "
        f"the model's vocabulary, or raise model.vocab_size={vocab_size}"
    )
