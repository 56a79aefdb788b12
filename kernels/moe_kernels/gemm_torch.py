"""The grouped products in torch: the reference of `gemm.py`'s kernels, and the fast path on a CPU.

Letters and index ranges are those of `gemm.py`. `product` and `weight_gradient` go group by group; `forward`, `dgrad`
and `wgrad`, which `gemm.py` calls, go by `batches.py` in bf16 on a CPU.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .batches import Batches

__all__ = ["clear_nulls", "dgrad", "forward", "product", "weight_gradient", "wgrad"]


def forward(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """y (R, O) of contiguous x (R, I) and w (E, O, I)."""
    return _multiply(x, w.mT, offsets)


def dgrad(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """dx (R, I) of contiguous dy (R, O) and w (E, O, I)."""
    return _multiply(dy, w, offsets)


def _multiply(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    if not Batches.fit(x, offsets, len(x)):
        return product(x, w, offsets)
    lie = Batches(offsets, len(x))
    rows, y = lie.spread(x), x.new_empty(lie.n_slots, w.shape[2])
    for piece in lie.pieces:
        piece.product(rows[piece.slots], w, y[piece.slots])
    return lie.gather(y)


def wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I)."""
    if not Batches.fit(x, offsets, len(x)):
        return weight_gradient(dy, x, offsets, out_dtype)
    lie = Batches(offsets, len(x))
    dy, x = lie.spread(dy) * lie.real.unsqueeze(1), lie.spread(x)
    dw = lie.clear_idle(x.new_empty(len(offsets) - 1, dy.shape[1], x.shape[1], dtype=out_dtype))
    for piece in lie.pieces:
        piece.wgrad(dy[piece.slots], x[piece.slots], dw)
    return dw


# group by group


def product(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x[r] @ w[e(r)] of x (R, I) and w (E, I, O); anything in the rows behind the last group."""
    if x.is_cuda:
        w = w.to(x.dtype)
    if not (w.is_contiguous() or w.mT.is_contiguous()):
        w = w.contiguous()
    if _fits_grouped_mm(x, w if w.is_contiguous() else w.mT):
        return torch.nn.functional.grouped_mm(x, w, offs=offsets[1:])
    y = x.new_empty(x.shape[0], w.shape[2])
    for e, start, end in _groups(offsets):
        # weights are cast one by one, which then lie in the cache; and autocast does not change what has an `out`
        torch.mm(x[start:end], w[e].to(x.dtype), out=y[start:end])
    return y


def weight_gradient(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I)."""
    if _fits_grouped_mm(dy, x):
        dw = torch.nn.functional.grouped_mm(dy.t(), x, offs=offsets[1:])
        if dw.is_cuda:  # experts without rows: not promised to be written
            dw.masked_fill_((offsets[1:] == offsets[:-1])[:, None, None], 0)
        return dw.to(out_dtype)
    dw = dy.new_empty(len(offsets) - 1, dy.shape[1], x.shape[1], dtype=out_dtype)
    dw.index_fill_(0, (offsets[1:] == offsets[:-1]).nonzero().squeeze(1), 0)
    one = dy.new_empty(dw.shape[1:])
    for e, start, end in _groups(offsets):
        dw[e] = torch.mm(dy[start:end].t(), x[start:end], out=one)
    return dw


def clear_nulls(values: Tensor, offsets: Tensor) -> Tensor:
    """`values` (R, ...) with 0 in the rows behind the last group. In place; no sync on CUDA."""
    if values.is_cuda:
        empty = torch.arange(len(values), device=values.device) >= offsets[-1]
        return values.masked_fill_(empty.view(-1, *[1] * (values.dim() - 1)), 0)
    values[int(offsets[-1]) :] = 0
    return values


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
