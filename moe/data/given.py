"""Tokens of one's own, already made: what a hook returns instead of `data.source`."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from moe.data.load import Sampling, TrainingData
from moe.data.sequences import Sequences
from moe.data.tokens import DataFacts, joint_sha256
from moe.errors import DataError

__all__ = ["data_from_tokens"]


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
            raise DataError(
                f"{name}: token ids go from {tokens.min()} to {tokens.max()}, not from 0 to {vocab_size - 1}"
            )
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
