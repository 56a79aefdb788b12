"""What every source of text is: documents in a fixed order, in two splits, and for a stream a share of them a rank."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, Protocol

from moe.errors import DataError

__all__ = ["DocumentStream", "EveryNth", "Source", "Split", "held_out"]

Split = Literal["train", "validation"]


class Source(ABC):
    """Documents of two splits that share none. `name` is the word of data.source."""

    name: str

    @abstractmethod
    def _read(self, split: Split) -> Iterator[str]:
        """The documents of a split, empty ones among them."""

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, in the same order each time, without empty ones.

        Raises DataError at the end when there was none, and where one cannot be read.
        """
        found = False
        for text in self._read(split):
            if text:
                found = True
                yield text
        if not found:
            which = "training" if split == "train" else "validation"
            raise DataError(
                f"data.source={self.name!r} leaves the {which} split without text; give more, or longer, documents"
            )

    def stream(self, rank: int, ranks: int) -> "DocumentStream":
        """Rank `rank`'s share of the training documents."""
        return EveryNth(self, rank, ranks)


class DocumentStream(Protocol):
    """One rank's documents, epoch after epoch, and the place it has come to as plain JSON values."""

    epoch: int

    def read(self, count: int) -> list[str]:
        """The next `count` documents at most: fewer, or none, at the end of an epoch."""

    def state(self) -> dict[str, Any]:
        """Where the next `read` begins."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""


class EveryNth:
    """Every `ranks`-th document of a source that is read anew each epoch. Restoring reads up to the place again."""

    def __init__(self, source: Source, rank: int, ranks: int) -> None:
        self._source, self._rank, self._ranks = source, rank, ranks
        self.epoch = self._passed = 0
        self._documents: Iterator[str] | None = None

    def read(self, count: int) -> list[str]:
        if self._documents is None:
            passed = self._rank + self._passed * self._ranks
            self._documents = islice(self._source.documents("train"), passed, None, self._ranks)
        found = list(islice(self._documents, count))
        self._passed += len(found)
        if len(found) < count:
            self.restore({"epoch": self.epoch + 1, "documents": 0})
        return found

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "documents": self._passed}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self._passed = state["epoch"], state["documents"]
        self._documents = None


def held_out(number: int, fraction: float) -> bool:
    """Whether document `number` (from 0) is for validation: the first one, then evenly spread."""
    return math.ceil((number + 1) * fraction) > math.ceil(number * fraction)
