"""Sequences by number: a batch is a pure function of (seed, global sequence index), whatever the number of ranks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.errors import ConfigError

__all__ = ["Sequences", "document_ids"]


class Sequences:
    """Cuts an array of tokens into sequences of `seq_len` and serves them in an order shuffled anew each epoch.

    `seed=None` serves them in order, for evaluation. What is left over at the end is not used.

    Raises ConfigError when there is not one whole sequence.
    """

    def __init__(self, tokens: NDArray[np.int32], seq_len: int, seed: int | None) -> None:
        self.count = len(tokens) // seq_len
        if self.count == 0:
            raise ConfigError(
                f"train.seq_len={seq_len} exceeds the data ({len(tokens)} tokens): shorten it or add text"
            )
        self._rows = tokens[: self.count * seq_len].reshape(self.count, seq_len)
        self._seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.arange(self.count)

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self.count

    def batch(self, first: int, size: int) -> Tensor:
        """Sequences first … first + size - 1 of the endless stream: (size, seq_len) int64 on the CPU."""
        rows = [self._rows[self._position(index)] for index in range(first, first + size)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _position(self, index: int) -> int:
        epoch, place = divmod(index, self.count)
        if self._seed is not None and epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self.count)
            self._epoch = epoch
        return int(self._order[place])


def document_ids(ids: Tensor, end_token: int) -> Tensor:
    """Number of the document each token of a sequence lies in, (B, S): a document ends with its `end_token`."""
    ends = (ids == end_token).long()
    return ends.cumsum(1) - ends
