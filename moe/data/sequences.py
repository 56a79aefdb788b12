"""Sequences by number: a batch is a pure function of (seed, global sequence index), whatever the number of ranks."""

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.data.tokens import Tokens
from moe.errors import ConfigError

__all__ = ["CountedSequences", "SequenceReader", "Sequences", "document_ids"]


class SequenceReader(Protocol):
    """What training reads from: sequences by number, a mixture of such, or a stream, which has a place to keep."""

    def batch(self, first: int, size: int) -> Tensor:
        """Sequences first … first + size - 1 of all ranks' endless stream: (size, seq_len) int64 on the CPU."""

    def state(self) -> dict[str, Any]:
        """The place as plain JSON values: of this rank, after the last batch."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


class CountedSequences(SequenceReader, Protocol):
    """Sequences that come to an end, as those for evaluation do."""

    def __len__(self) -> int: ...


class Sequences:
    """Cuts tokens into sequences of `seq_len` and serves them in an order shuffled anew each epoch.

    `seed=None` serves them in order, for evaluation. What is left over at the end is not used.

    Raises ConfigError when there is not one whole sequence.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int | None) -> None:
        self.count = len(tokens) // seq_len
        if self.count == 0:
            raise ConfigError(
                f"train.seq_len={seq_len} exceeds the data ({len(tokens)} tokens): shorten it or add text"
            )
        self._tokens, self._seq_len = tokens, seq_len
        self._seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self.count

    def batch(self, first: int, size: int) -> Tensor:
        """Sequences first … first + size - 1 of the endless stream: (size, seq_len) int64 on the CPU."""
        starts = [self._position(index) * self._seq_len for index in range(first, first + size)]
        rows = [self._tokens[start : start + self._seq_len] for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def state(self) -> dict[str, Any]:
        """Nothing: a number says it all."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def _position(self, index: int) -> int:
        epoch, place = divmod(index, self.count)
        if self._seed is None:
            return place
        if self._order is None or epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self.count)
            self._epoch = epoch
        return int(self._order[place])


def document_ids(ids: Tensor, end_token: int) -> Tensor:
    """Number of the document each token of a sequence lies in, (B, S): a document ends with its `end_token`."""
    ends = (ids == end_token).long()
    return ends.cumsum(1) - ends
