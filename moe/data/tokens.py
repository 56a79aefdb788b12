"""A byte-level BPE tokenizer for the corpus, and the corpus as one array of token ids a split."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.data.corpus import Corpus
from moe.errors import DataError

__all__ = ["END_OF_TEXT", "DataFacts", "TokenData", "prepare", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"  # id 0; ends every document


@dataclass(frozen=True)
class DataFacts:
    """What data.json holds: enough to tell whether two runs saw the same data."""

    source: str
    corpus_sha256: str
    train_sha256: str
    validation_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    validation_bytes: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


@dataclass(frozen=True)
class TokenData:
    """The corpus as token ids: documents one after another, each ended by END_OF_TEXT."""

    train: NDArray[np.int32]
    validation: NDArray[np.int32]
    facts: DataFacts
    end_token: int


def prepare(corpus: Corpus, tokenizer_file: Path, vocab_size: int) -> TokenData:
    """Tokenise `corpus` with the tokenizer at `tokenizer_file`. Raises DataError when sizes disagree."""
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises plain Exception for every kind of bad file
        raise DataError(f"{tokenizer_file} is not a tokenizer ({error}); delete it to train it again") from None
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise DataError(f"model.vocab_size={vocab_size} but {tokenizer_file} has {found} tokens; make them equal")
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise DataError(f"the tokenizer has no {END_OF_TEXT} token; delete tokenizer.json to train it again")
    train, validation = _encode(tokenizer, corpus.train, end), _encode(tokenizer, corpus.validation, end)
    facts = DataFacts(
        source=corpus.source,
        corpus_sha256=corpus.sha256,
        train_sha256=corpus.train_sha256,
        validation_sha256=corpus.validation_sha256,
        tokenizer_sha256=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        vocab_size=vocab_size,
        train_tokens=len(train),
        validation_tokens=len(validation),
        validation_bytes=sum(len(text.encode()) for text in corpus.validation),
    )
    return TokenData(train, validation, facts, end)


def train_tokenizer(corpus: Corpus, vocab_size: int, file: Path) -> None:
    """Train byte-level BPE on the training split and save it. Raises DataError when the text is too small."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(f"model.vocab_size={vocab_size} must exceed {len(alphabet)}: every byte is a token")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is more than this corpus yields ({tokenizer.get_vocab_size()}); lower it"
        )
    aside = file.with_name(f".{file.name}")
    tokenizer.save(str(aside))
    aside.replace(file)


def _encode(tokenizer: Tokenizer, texts: tuple[str, ...], end: int) -> NDArray[np.int32]:
    ids: list[NDArray[np.int32]] = []
    for encoding in tokenizer.encode_batch_fast(list(texts)):
        ids.append(np.asarray([*encoding.ids, end], dtype=np.int32))
    return np.concatenate(ids)
