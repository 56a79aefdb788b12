"""A source as tokens: what each split holds, with a hash that names exactly its text."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe.data.tokenizer import DocumentEncoder
from moe.errors import DataError

__all__ = ["DataFacts", "SourceTokens", "SplitTokens", "Tally", "Tokens", "joint_sha256", "tokenise_split"]


class Tokens(Protocol):
    """Token ids by place: an array, or shards on the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class SplitTokens:
    """A split: documents one after another, each ended by the end token. `sha256` and `bytes` are of the text."""

    tokens: Tokens
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceTokens:
    """Both splits of a source. `sha256` is that of all that decides its tokens, apart from the tokenizer."""

    name: str
    train: SplitTokens
    validation: SplitTokens
    sha256: str


@dataclass(frozen=True)
class DataFacts:
    """What data.json holds: enough to tell whether two runs saw the same data. A stream's length is not known."""

    source: str
    corpus_sha256: str
    train_sha256: str
    validation_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    train_tokens: int | None
    validation_tokens: int
    validation_bytes: int

    def to_dict(self) -> dict[str, str | int | None]:
        return asdict(self)


class Tally:
    """Counts documents and their bytes as they pass, and hashes their text."""

    def __init__(self, name: str) -> None:
        self.name, self._digest = name, hashlib.sha256()
        self.documents = self.bytes = 0

    def through(self, documents: Iterable[str]) -> Iterator[str]:
        """The same documents. Raises DataError for one that is not text."""
        for text in documents:
            try:
                raw = text.encode()
            except UnicodeEncodeError:
                raise DataError(
                    f"data.source={self.name!r}: document {self.documents} holds half a surrogate pair, which is not "
                    "UTF-8 text; remove it"
                ) from None
            self._digest.update(len(raw).to_bytes(8, "little"))
            self._digest.update(raw)
            self.documents += 1
            self.bytes += len(raw)
            yield text

    @property
    def sha256(self) -> str:
        """Of all text so far, and of where documents end."""
        return self._digest.hexdigest()


def joint_sha256(parts: Sequence[str]) -> str:
    """One hash for several, in their order."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def tokenise_split(name: str, documents: Iterable[str], encoder: DocumentEncoder) -> SplitTokens:
    """Documents of the source `name` as one array in memory, two or four bytes a token; the text is not kept."""
    tally = Tally(name)
    ids = np.concatenate(list(encoder.encode(tally.through(documents))))
    return SplitTokens(ids, tally.documents, tally.bytes, tally.sha256)
