"""Grouped products in bf16 on a CPU: experts of like load in one batched product.

oneDNN multiplies a batch of small matrices faster than one after the other, a thread each. And it compiles its product
anew for every shape, 2 ms and 0.7 MB of code each where there is AMX, and keeps some thousand, while experts have other
numbers of rows in every step. So an expert gets room for one of four numbers of rows an octave; and in the order of
their room, 8 or 2 get as much as the largest among them, if that adds no more than a quarter, else one is alone.

Rows lie in slots, batch after batch, the largest first, and within one by the number of their expert. What fills an
expert up repeats its last row, which is as finite as the others; whoever adds over slots gives it the weight 0. Behind
all come slots of no expert, the last of which is that of the rows behind the last group. What is not a product is done
for a piece of the slots at a time, some batches whose rows fit the cache. Letters: R rows, S slots, P slots of a piece,
E experts, I inputs, O outputs.

Example: groups of 33, 30, 0 and 2 rows -> a batch of the second and the fourth expert, slots 0 .. 31 and 32 .. 63, and
one of the first, 64 .. 127, both in one piece; then 896 of no expert.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .scratch import Scratch

__all__ = ["STEP", "Batches"]

STEP = 32  # rows; rooms are multiples of it
_TOGETHER = (8, 2, 1)  # experts in one product: few numbers, that few shapes occur
_SURPLUS = 1.25
_PIECE = 2048  # slots, or one batch: fewer and what surrounds an operation counts, more and rows fall out of the cache
_SLOTS = 1024  # a multiple of them: tensors of like size in every step find their memory again


class Batch(NamedTuple):
    """Experts of one product, by rising number, each with room for so many rows."""

    experts: list[int]
    room: int

    @property
    def n_slots(self) -> int:
        """What they take together."""
        return len(self.experts) * self.room


class Piece:
    """Batches of experts, one behind the other; and their products.

    slots: where they lie.
    rows: theirs among all rows in the order of their slots, without what fills experts up.
    """

    def __init__(self, batches: list[Batch], slots: slice, rows: slice, scratch: Scratch) -> None:
        self.slots, self.rows = slots, rows
        self._scratch = scratch
        ends = accumulate((batch.n_slots for batch in batches), initial=0)
        self._batches = [
            (len(batch.experts), _in_twos(batch.experts), slice(start, end))
            for batch, (start, end) in zip(batches, pairwise(ends), strict=True)
        ]

    def product(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """y[s] = x[s] @ w[e(s)] of x (P, I) and w (E, I, O), cast; y (P, O)."""
        stored = w if w.is_contiguous() else w.mT
        for count, twos, rows in self._batches:
            some = self._scratch("matrices", (count, *stored.shape[1:]), x.dtype)
            torch._foreach_copy_(some.split(2), [stored[two] for two in twos])
            torch.bmm(_apart(x[rows], count), some if stored is w else some.mT, out=_apart(y[rows], count))

    def wgrad(self, dy: Tensor, x: Tensor, dw: Tensor) -> None:
        """dw[e] = dy[s]^T x[s] of the experts here; dy (P, O) and x (P, I), dw (E, O, I)."""
        for count, twos, rows in self._batches:
            some = self._scratch("matrices", (count, *dw.shape[1:]), x.dtype)
            torch.bmm(_apart(dy[rows], count).mT, _apart(x[rows], count), out=some)
            torch._foreach_copy_([dw[two] for two in twos], some.split(2))


def _apart(rows: Tensor, count: int) -> Tensor:
    return rows.view(count, -1, rows.shape[1])


def _in_twos(experts: list[int]) -> list[slice]:
    """Slices that pick out rising numbers, two at a time: half as many copies, each large enough for two threads."""
    twos = (experts[i : i + 2] for i in range(0, len(experts), 2))
    return [slice(two[0], two[-1] + 1, max(1, two[-1] - two[0])) for two in twos]


class Batches:
    """Where the rows of sorted groups lie, and the pieces they are multiplied in.

    pieces: their slots lie one behind the other.
    n_slots: S, those of no expert too.
    real: (S,) bool, where a row of an expert lies, and not what fills one up.
    real_slots: int64, the slots where that is so, rising.
    scratch: buffers for the caller too.
    """

    @staticmethod
    def fit(x: Tensor, offsets: Tensor, n_rows: int) -> bool:
        """Whether rows of the dtype of x, on its device, are to be multiplied so."""
        fewer = n_rows < STEP * (len(offsets) - 1)  # would be filled up to several times as many
        return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not fewer

    def __init__(self, offsets: Tensor, n_rows: int) -> None:
        self.scratch = Scratch(offsets.device)
        starts = offsets.tolist()
        loads = [end - start for start, end in pairwise(starts)]
        self._idle = [expert for expert, load in enumerate(loads) if not load]
        found = _batches(loads)
        self.pieces: list[Piece] = []
        end = row = 0
        for some in _pieces(found):
            start, first = end, row
            end += sum(batch.n_slots for batch in some)
            row += sum(loads[expert] for batch in some for expert in batch.experts)
            self.pieces.append(Piece(some, slice(start, end), slice(first, row), self.scratch))
        self.n_slots = (end // _SLOTS + 1) * _SLOTS
        room_B = np.array([batch.room for batch in found for _ in batch.experts], np.int64)
        load_B, start_B = (
            np.array([values[expert] for batch in found for expert in batch.experts], np.int64)
            for values in (loads, starts)
        )
        at_S = np.arange(end) - np.repeat(np.cumsum(room_B) - room_B, room_B)
        load_S = np.repeat(load_B, room_B)
        row_S, real_S = np.zeros(self.n_slots, np.int64), np.zeros(self.n_slots, bool)
        row_S[:end] = np.repeat(start_B, room_B) + np.minimum(at_S, load_S - 1)
        real_S[:end] = at_S < load_S
        real_slots = real_S.nonzero()[0]
        slot_R = np.full(n_rows, self.n_slots - 1)
        slot_R[row_S[real_slots]] = real_slots
        self._row_S, self.real, self.real_slots, self._slot_R = (
            torch.from_numpy(part) for part in (row_S, real_S, real_slots, slot_R)
        )

    def spread(self, values: Tensor) -> Tensor:
        """(S, ...) of (R, ...), where what fills an expert up repeats its last row."""
        return values.index_select(0, self._row_S)

    def gather(self, values: Tensor) -> Tensor:
        """(R, ...) of (S, ...)."""
        return values.index_select(0, self._slot_R)

    def slots_of(self, rows: Tensor) -> Tensor:
        """Where these rows lie."""
        return self._slot_R.index_select(0, rows)

    def clear(self, values: Tensor) -> Tensor:
        """`values` (S, ...) with 0 in the last slot. In place."""
        values[-1] = 0
        return values

    def clear_idle(self, dw: Tensor) -> Tensor:
        """`dw` (E, O, I) with 0 for experts without a row. In place."""
        for expert in self._idle:
            dw[expert] = 0
        return dw


def _batches(loads: list[int]) -> list[Batch]:
    """Those of experts with so many rows; the largest comes first, so that buffers seldom grow."""
    rooms = {expert: _room(load) for expert, load in enumerate(loads) if load}
    left = sorted(rooms, key=rooms.__getitem__)
    found = []
    while left:
        for count in _TOGETHER:
            some = left[:count]
            batch = Batch(sorted(some), rooms[some[-1]])
            if len(some) == count and batch.n_slots <= _SURPLUS * sum(rooms[expert] for expert in some):
                break
        found.append(batch)
        left = left[count:]
    return sorted(found, key=lambda batch: -batch.n_slots)


def _pieces(batches: list[Batch]) -> Iterator[list[Batch]]:
    """Runs of them with a piece's slots at most, or one alone."""
    piece: list[Batch] = []
    for batch in batches:
        if piece and sum(other.n_slots for other in piece) + batch.n_slots > _PIECE:
            yield piece
            piece = []
        piece.append(batch)
    if piece:
        yield piece


def _room(load: int) -> int:
    """The least room for so many rows: a multiple of 32, and of a quarter of the power of two below."""
    step = max(STEP, (1 << (load - 1).bit_length()) // 8)
    return -(-load // step) * step
