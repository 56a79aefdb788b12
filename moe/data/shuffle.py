"""Documents of a stream in another order: block after block, each shuffled in itself."""

from typing import Any

import numpy as np

from moe.data.sources import DocumentStream

__all__ = ["ShuffledDocuments"]


class ShuffledDocuments:
    """The documents of `documents`, `size` at a time in an order that follows from `seed` and the block's number.

    Blocks are counted through all epochs, so each epoch has another order; its last block may be shorter. Never are
    more than `size` documents held, and none is kept by the state: restoring reads its block again.

    Example: of documents 0, 1, 2, 3, 4, … and size 3 come first 0, 1 and 2 in some order, then 3, 4 and 5.
    """

    def __init__(self, documents: DocumentStream, size: int, seed: int) -> None:
        self._documents, self._size, self._seed = documents, size, seed
        self._number = 0
        self._begin()

    def read(self, count: int) -> list[str]:
        """At most the next `count` documents of the block."""
        self._fill()
        found = self._block[self._used : self._used + count]
        self._used += len(found)
        if self._used == len(self._block):
            self._number += 1
            self._begin()
        return found

    def state(self) -> dict[str, Any]:
        return {"documents": self._before, "block": self._number, "used": self._used}

    def restore(self, state: dict[str, Any]) -> None:
        self._documents.restore(state["documents"])
        self._number = state["block"]
        self._begin()
        if state["used"]:
            self._fill()
            self._used = state["used"]

    def _begin(self) -> None:
        """Before the next block, of which nothing is read yet."""
        self._before, self.epoch = self._documents.state(), self._documents.epoch
        self._block: list[str] = []
        self._used = 0

    def _fill(self) -> None:
        """Read the block, unless it is there."""
        if not self._block:
            texts = self._documents.read(self._size)
            order = np.random.Generator(np.random.PCG64([self._seed, self._number])).permutation(len(texts))
            self._block = [texts[place] for place in order]
