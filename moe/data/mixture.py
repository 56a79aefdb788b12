"""Sequences of several sources in fixed shares: which source sequence n comes from is a function of n alone."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe.data.sequences import SequenceReader, Sequences

__all__ = ["Mixture"]

_UNIT = 40  # bits of a share: whole numbers, so that no rounding depends on how far a run has come


class Mixture:
    """Takes sequence n from one of `parts`, evenly spread, so that every stretch of sequences has the shares `weights`.

    The first part takes its share of all numbers, the second its share of what the first leaves, and so on. A share w
    of numbers is those n where floor((n + 1) w) exceeds floor(n w), and floor(n w) is the number within the part.

    Example: weights (1, 1) give parts 1, 0, 1, 0, …, each its sequences 0, 0, 1, 1, ….
    """

    def __init__(self, parts: Sequence[SequenceReader], weights: Sequence[float]) -> None:
        self._parts = parts
        self._shares = [
            round(weight / sum(weights[number:]) * (1 << _UNIT)) for number, weight in enumerate(weights[:-1])
        ]

    def __len__(self) -> int:
        """How many sequences until a part would begin anew; all parts must be counted."""
        lengths = [len(part) for part in self._parts if isinstance(part, Sequences)]

        def repeats(number: int) -> bool:
            return any(count > length for count, length in zip(self._counts(number), lengths, strict=True))

        return bisect_left(range(sum(lengths) + 1), True, key=repeats) - 1

    def batch(self, first: int, size: int) -> Tensor:
        """Sequences first … first + size - 1: (size, seq_len) int64 on the CPU."""
        places = map(self.place, range(first, first + size))
        return torch.cat([self._parts[part].batch(number, 1) for part, number in places])

    def place(self, index: int) -> tuple[int, int]:
        """Of which part sequence `index` is, and its number there."""
        for part, share in enumerate(self._shares):
            before = index * share >> _UNIT
            if (index + 1) * share >> _UNIT > before:
                return part, before
            index -= before
        return len(self._shares), index

    def state(self) -> dict[str, Any]:
        return {"parts": [part.state() for part in self._parts]}

    def restore(self, state: dict[str, Any]) -> None:
        for part, kept in zip(self._parts, state["parts"], strict=True):
            part.restore(kept)

    def _counts(self, number: int) -> list[int]:
        """How many of the first `number` sequences are of each part."""
        counts = []
        for share in self._shares:
            counts.append(number * share >> _UNIT)
            number -= counts[-1]
        return [*counts, number]
