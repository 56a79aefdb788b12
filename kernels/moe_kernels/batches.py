"""Grouped products in bf16 on a CPU: experts of like load in one batched product.

oneDNN multiplies a batch of small matrices faster than one after the other, a thread each. And it compiles its product
anew for every shape, 2 ms and 0.7 MB of code each where there is AMX, and keeps some thousand, while experts have other
numbers of rows in every step. So an expert gets room for one of four numbers of rows an octave; and in the order of
their room, 16 or 4 get as much as the largest among them, if that adds no more than a quarter, else one is alone.

Rows lie in slots, expert after expert in that order. What fills an expert up repeats its last row, which is as finite
as the others; whoever adds over slots gives it the weight 0. Behind all come slots of no expert, the last of which is
that of the rows behind the last group. Letters: R rows, S slots, P slots of a batch, E experts, I inputs, O outputs.

Example: groups of 33, 30, 0 and 2 rows -> a batch each, slots 0 .. 63 for the first expert, 64 .. 95 for the second and
96 .. 127 for the fourth; then 896 of no expert.
"""

from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from .scratch import Scratch

__all__ = ["STEP", "Batches"]

STEP = 32  # rows; rooms are multiples of it
_TOGETHER = (16, 4, 1)  # experts in one product: few numbers, that few shapes occur
_SURPLUS = 1.25
_SLOTS = 1024  # a multiple of them: tensors of like size in every step find their memory again


class Batch:
    """Experts of one room, one behind the other in `slots`; and their products."""

    def __init__(self, experts: list[int], slots: slice, scratch: Scratch) -> None:
        self.slots = slots
        self._experts, self._scratch = experts, scratch

    def product(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """y[s] = x[s] @ w[e(s)] of x (P, I) and w (E, I, O), cast; y (P, O)."""
        stored = w if w.is_contiguous() else w.mT
        some = self._scratch("matrices", (len(self._experts), *stored.shape[1:]), x.dtype)
        torch._foreach_copy_(some.unbind(), [stored[expert] for expert in self._experts])
        torch.bmm(self._apart(x), some if stored is w else some.mT, out=self._apart(y))

    def wgrad(self, dy: Tensor, x: Tensor, dw: Tensor) -> None:
        """dw[e] = dy[s]^T x[s] of this batch's experts; dy (P, O) and x (P, I), dw (E, O, I)."""
        some = self._scratch("matrices", (len(self._experts), *dw.shape[1:]), x.dtype)
        torch.bmm(self._apart(dy).mT, self._apart(x), out=some)
        torch._foreach_copy_([dw[expert] for expert in self._experts], some.unbind())

    def _apart(self, rows: Tensor) -> Tensor:
        return rows.view(len(self._experts), -1, rows.shape[1])


class Batches:
    """Where the rows of sorted groups lie, and the batches they are multiplied in.

    batches: their slots lie one behind the other.
    n_slots: S, those of no expert too.
    row_S: (S,) int64, the row that lies in a slot.
    real: (S,) bool, where a row of an expert lies, and not what fills one up.
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
        ends = [0, *accumulate(len(experts) * room for experts, room in found)]
        self.batches = [
            Batch(experts, slice(start, end), self.scratch)
            for (experts, _), (start, end) in zip(found, pairwise(ends), strict=True)
        ]
        end = ends[-1]
        self.n_slots = (end // _SLOTS + 1) * _SLOTS
        room_B = np.array([room for experts, room in found for _ in experts], np.int64)
        load_B, start_B = (
            np.array([values[expert] for experts, _ in found for expert in experts], np.int64)
            for values in (loads, starts)
        )
        at_S = np.arange(end) - np.repeat(np.cumsum(room_B) - room_B, room_B)
        load_S = np.repeat(load_B, room_B)
        row_S, real_S = np.zeros(self.n_slots, np.int64), np.zeros(self.n_slots, bool)
        row_S[:end] = np.repeat(start_B, room_B) + np.minimum(at_S, load_S - 1)
        real_S[:end] = at_S < load_S
        slot_R = np.full(n_rows, self.n_slots - 1)
        slot_R[row_S[real_S]] = real_S.nonzero()[0]
        self.row_S, self.real, self._slot_R = (torch.from_numpy(part) for part in (row_S, real_S, slot_R))

    def spread(self, values: Tensor) -> Tensor:
        """(S, ...) of (R, ...), where what fills an expert up repeats its last row."""
        return values.index_select(0, self.row_S)

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


def _batches(loads: list[int]) -> list[tuple[list[int], int]]:
    """(experts, slots of each) of every batch, of the number of rows of each expert; the largest batch comes first, so
    that buffers need not grow."""
    rooms = {expert: _room(load) for expert, load in enumerate(loads) if load}
    left = sorted(rooms, key=rooms.__getitem__)
    found = []
    while left:
        for count in _TOGETHER:
            batch = left[:count]
            room = rooms[batch[-1]]
            if len(batch) == count and room * count <= _SURPLUS * sum(rooms[expert] for expert in batch):
                break
        found.append((batch, room))
        left = left[count:]
    return sorted(found, key=lambda batch: -len(batch[0]) * batch[1])


def _room(load: int) -> int:
    """The least room for so many rows: a multiple of 32, and of a quarter of the power of two below."""
    step = max(STEP, (1 << (load - 1).bit_length()) // 8)
    return -(-load // step) * step
