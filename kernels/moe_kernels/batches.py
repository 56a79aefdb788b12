"""Grouped products in bf16 on a CPU: experts of like load in one batched product.

oneDNN multiplies a batch of small matrices faster than one after the other, a thread each. And it compiles its product
anew for every shape and keeps some thousand, while experts have other numbers of rows in every step. So an expert gets
room for a whole number of steps of rows; and in the order of their room, up to 16 get as much as the largest among
them, if that adds no more than a tenth. Forward and backward of 64 experts (D = 256, F = 128, 12288 rows, two threads,
fp32 masters) took 44 ms so and 58 expert by expert, in steps too; 49 and 55 with loads that differ by half.

Rows lie in slots, expert after expert in that order. What fills an expert up repeats its last row, which is as finite
as the others; whoever adds over slots has to blank it. One more slot, behind all, is that of the rows behind the last
group. Letters: R rows, S slots, E experts, I inputs, O outputs.

Example: groups of 33, 30, 0 and 2 rows in steps of 32 -> slots 0 .. 63 for the second and the fourth, as a batch of
two; 64 .. 127 for the first.
"""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["STEP", "Batches"]

STEP = 32
_MOST = 16
_SURPLUS = 1.1


class Batches:
    """Where the rows of sorted groups lie, and their products; the methods of `gemm_torch.Groups`."""

    def __init__(self, offsets: Tensor, n_rows: int) -> None:
        starts = offsets.tolist()
        loads = [end - start for start, end in pairwise(starts)]
        self._n_experts, self._idle = len(loads), [expert for expert, load in enumerate(loads) if not load]
        self._pieces: list[tuple[list[int], slice, tuple[int, int, int]]] = []  # experts, slots, the latter's shape
        order, room, n_slots = [], [], 0
        for experts, slots in _batches(loads):
            before, n_slots = n_slots, n_slots + len(experts) * slots
            self._pieces.append((experts, slice(before, n_slots), (len(experts), slots, -1)))
            order += experts
            room += [slots] * len(experts)
        room_B, load_B, start_B = (
            torch.tensor(values, dtype=torch.int64)
            for values in (room, [loads[e] for e in order], [starts[e] for e in order])
        )
        at_S = torch.arange(n_slots) - (room_B.cumsum(0) - room_B).repeat_interleave(room_B)
        last_S = (load_B - 1).repeat_interleave(room_B)
        row_S = start_B.repeat_interleave(room_B) + at_S.minimum(last_S)
        real_S = at_S <= last_S
        self._row_S = torch.cat([row_S, row_S.new_zeros(1)])
        self._blank = torch.cat([(~real_S).nonzero().squeeze(1), row_S.new_full((1,), n_slots)])
        self._slot_R = row_S.new_full((n_rows,), n_slots)
        self._slot_R[row_S[real_S]] = real_S.nonzero().squeeze(1)

    def spread(self, values: Tensor) -> Tensor:
        """(S, ...) of (R, ...), where what fills an expert up repeats its last row."""
        return values.index_select(0, self._row_S)

    def gather(self, values: Tensor) -> Tensor:
        """(R, ...) of (S, ...)."""
        return values.index_select(0, self._slot_R)

    def slots(self, rows: Tensor) -> Tensor:
        """Where these rows lie."""
        return self._slot_R.index_select(0, rows)

    def blank(self, values: Tensor) -> Tensor:
        """`values` (S, ...) with 0 in the slots that are no row's, or no product's. In place."""
        return values.index_fill_(0, self._blank, 0)

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """x[s] @ w[e(s)] of x (S, I) and w (E, I, O), cast batch by batch; anything in the last slot."""
        y = x.new_empty(len(x), w.shape[2])
        stored = w if w.is_contiguous() else w.mT
        for experts, slots, shape in self._pieces:
            some = stored.new_empty((len(experts), *stored.shape[1:]), dtype=x.dtype)
            torch._foreach_copy_(some.unbind(), [stored[expert] for expert in experts])
            torch.bmm(x[slots].view(shape), some if stored is w else some.mT, out=y[slots].view(shape))
        return y

    def wgrad(self, dy: Tensor, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """dw (E, O, I) in `out_dtype` of contiguous dy (S, O) and x (S, I), one of which is blank where no row is."""
        dw = dy.new_empty(self._n_experts, dy.shape[1], x.shape[1], dtype=out_dtype)
        if self._idle:
            dw[self._idle] = 0
        for experts, slots, shape in self._pieces:
            some = dy.new_empty(len(experts), *dw.shape[1:])
            torch.bmm(dy[slots].view(shape).mT, x[slots].view(shape), out=some)
            torch._foreach_copy_([dw[expert] for expert in experts], some.unbind())
        return dw


def _batches(loads: list[int]) -> list[tuple[list[int], int]]:
    """(experts, slots of each) of every batch, of the number of rows of each expert; as many as a power of two, so that
    few shapes occur."""
    room = {expert: -(-load // STEP) * STEP for expert, load in enumerate(loads) if load}
    left = sorted(room, key=lambda expert: room[expert])
    found = []
    while left:
        count = _MOST
        while count > len(left) or room[left[count - 1]] * count > _SURPLUS * sum(room[e] for e in left[:count]):
            count //= 2
        found.append((left[:count], room[left[count - 1]]))
        left = left[count:]
    return found
