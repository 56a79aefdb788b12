"""The grouped products in torch: the reference of `gemm.py`'s kernels, and the fast path on a CPU.

Letters and index ranges are those of `gemm.py`. Rows lie in slots: for most products as they were sorted, one behind
the other; for bf16 on a CPU with room between the experts (`batches.py`). Both layouts have the same methods.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .batches import STEP, Batches

__all__ = ["Groups", "dgrad", "forward", "layout_of", "wgrad"]


class Groups:
    """Row r lies in slot r. nulls: rows may lie behind the last group; they are no product's."""

    def __init__(self, offsets: Tensor, nulls: bool) -> None:
        self._offsets, self._nulls = offsets, nulls

    def spread(self, values: Tensor) -> Tensor:
        """(S, ...) of (R, ...): the same."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """(R, ...) of (S, ...): the same."""
        return values

    def slots(self, rows: Tensor) -> Tensor:
        """Where these rows lie: there."""
        return rows

    def blank(self, values: Tensor) -> Tensor:
        """`values` (S, ...) with 0 in the slots that are no product's. In place; no sync on CUDA."""
        if self._nulls and values.is_cuda:
            empty = torch.arange(len(values), device=values.device) >= self._offsets[-1]
            values.masked_fill_(empty.view(-1, *[1] * (values.dim() - 1)), 0)
        elif self._nulls:
            values[int(self._offsets[-1]) :] = 0
        return values

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        """x[r] @ w[e(r)] of x (S, I) and w (E, I, O); anything in the slots that are no product's."""
        if x.is_cuda:
            w = w.to(x.dtype)
        if not (w.is_contiguous() or w.mT.is_contiguous()):
            w = w.contiguous()
        if _fits_grouped_mm(x, w if w.is_contiguous() else w.mT):
            return torch.nn.functional.grouped_mm(x, w, offs=self._offsets[1:])
        y = x.new_empty(x.shape[0], w.shape[2])
        for e, start, end in _groups(self._offsets):
            # weights are cast one by one, which then lie in the cache; and autocast does not change what has an `out`
            torch.mm(x[start:end], w[e].to(x.dtype), out=y[start:end])
        return y

    def wgrad(self, dy: Tensor, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """dw (E, O, I) in `out_dtype` of contiguous dy (S, O) and x (S, I)."""
        if _fits_grouped_mm(dy, x):
            dw = torch.nn.functional.grouped_mm(dy.t(), x, offs=self._offsets[1:])
            if dw.is_cuda:  # experts without rows: not promised to be written
                dw.masked_fill_((self._offsets[1:] == self._offsets[:-1])[:, None, None], 0)
            return dw.to(out_dtype)
        dw = dy.new_empty(len(self._offsets) - 1, dy.shape[1], x.shape[1], dtype=out_dtype)
        dw.index_fill_(0, (self._offsets[1:] == self._offsets[:-1]).nonzero().squeeze(1), 0)
        product = dy.new_empty(dw.shape[1:])
        for e, start, end in _groups(self._offsets):
            dw[e] = torch.mm(dy[start:end].t(), x[start:end], out=product)
        return dw


def layout_of(x: Tensor, offsets: Tensor, n_rows: int, nulls: bool) -> Groups | Batches:
    """How rows are to lie that are multiplied in the dtype of x and on its device. nulls: some may be no expert's."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and n_rows >= STEP * (len(offsets) - 1):
        return Batches(offsets, n_rows)  # fewer rows would be filled up to several times as many
    return Groups(offsets, nulls)


def _fits_grouped_mm(*tensors: Tensor) -> bool:
    """Whether torch's grouped_mm is the way: on CUDA in bf16, on a CPU in fp32, for row-major rows of 16 aligned bytes.

    In fp32 it is faster than the loops (E = 64, D = 256, F = 128, R = 12288, one product: 11 ms against 13) and than
    batches (0.9 of their time), and it needs no offsets on the host.
    """
    dtype = torch.bfloat16 if tensors[0].is_cuda else torch.float32
    return all(
        t.dtype == dtype and t.numel() and t.is_contiguous() and not t.shape[-1] * t.element_size() % 16
        and not t.data_ptr() % 16
        for t in tensors
    )  # fmt: skip


def _groups(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, one past the last) of every expert that has rows; reads the offsets on the host."""
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(offsets.tolist())) if end > start]


# of rows as they are sorted


def forward(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """y (R, O) of contiguous x (R, I) and w (E, O, I)."""
    return _multiply(x, w.transpose(1, 2), offsets)


def dgrad(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """dx (R, I) of contiguous dy (R, O) and w (E, O, I)."""
    return _multiply(dy, w, offsets)


def _multiply(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    lie = layout_of(x, offsets, len(x), False)
    return lie.gather(lie.product(lie.spread(x), w))


def wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I)."""
    lie = layout_of(x, offsets, len(x), False)
    return lie.wgrad(lie.blank(lie.spread(dy)), lie.spread(x), out_dtype)
