"""The grouped products in torch: the reference of `gemm.py`'s kernels, and the fast path on a CPU.

Letters and index ranges are those of `gemm.py`.
"""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["dgrad", "forward", "wgrad"]

# oneDNN compiles its bf16 product anew for every number of rows and keeps some thousand, and experts have other numbers
# in every step. So on a CPU an expert's rows are taken in a window of a whole number of steps, with some of its
# neighbours' beside them: the six products of 64 experts (R = 12288, D = 256, F = 128, one thread, new log-normal loads
# with sigma 0.5 each time) take 75 ms so, and 164 with exact numbers. With sigma 0.1 few numbers occur: 77 and 76.
_STEP = 32


def _fits_grouped_mm(*tensors: Tensor) -> bool:
    """Whether torch's grouped_mm is the way: on CUDA in bf16, on a CPU in fp32, for row-major rows of 16 aligned bytes.

    In fp32 it is faster than the loops below (E = 64, D = 256, F = 128, R = 12288, one product: 11 ms against 13), and
    it needs no offsets on the host.
    """
    dtype = torch.bfloat16 if tensors[0].is_cuda else torch.float32
    return all(
        t.dtype == dtype and t.numel() and not t.shape[-1] * t.element_size() % 16 and not t.data_ptr() % 16
        for t in tensors
    )


def forward(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """y (R, O) of contiguous x (R, I) and w (E, O, I)."""
    if _fits_grouped_mm(x, w):
        return torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])
    return _multiply_groups(x, w.transpose(1, 2), offsets)


def dgrad(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """dx (R, I) of contiguous dy (R, O) and w (E, O, I)."""
    if _fits_grouped_mm(dy, w):
        return torch.nn.functional.grouped_mm(dy, w, offs=offsets[1:])
    return _multiply_groups(dy, w, offsets)


def _multiply_groups(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x[r] @ w[e(r)]. Weights are cast to x's dtype one by one, which then lie in the cache."""
    y = x.new_empty(x.shape[0], w.shape[2])
    for e, start, end in _groups(offsets):
        first, last = _window(start, end, x)
        matrix = w[e].to(x.dtype)
        if first == start:  # what is too much lies behind, where later experts write
            torch.mm(x[first:last], matrix, out=y[first:last])
        else:
            y[start:end] = (x[first:last] @ matrix)[start - first : end - first]
    y[int(offsets[-1]) :] = 0
    return y


def wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I)."""
    if _fits_grouped_mm(dy, x):
        dw = torch.nn.functional.grouped_mm(dy.t(), x, offs=offsets[1:])
        if dw.is_cuda:  # experts without rows: not promised to be written
            dw.masked_fill_((offsets[1:] == offsets[:-1])[:, None, None], 0)
        return dw.to(out_dtype)
    dw = dy.new_empty(offsets.numel() - 1, dy.shape[1], x.shape[1], dtype=out_dtype)
    dw.index_fill_(0, (offsets[1:] == offsets[:-1]).nonzero().squeeze(1), 0)
    product = dy.new_empty(dw.shape[1:])  # one for all, in the cache, cast on its way out
    for e, start, end in _groups(offsets):
        more = _whole_steps(end - start, x) - (end - start)
        # more rows of zeros, not the neighbours': these would be added up too
        dy_rows, x_rows = (torch.nn.functional.pad(part[start:end], (0, 0, 0, more)) for part in (dy, x))
        dw[e] = torch.mm(dy_rows.t(), x_rows, out=product)
    return dw


def _groups(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, one past the last) of every expert that has rows; reads the offsets on the host."""
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(offsets.tolist())) if end > start]


def _window(start: int, end: int, x: Tensor) -> tuple[int, int]:
    """(first row, one past the last) to multiply for the rows start .. end: a whole number of steps, if x has as many.

    Example: 5 .. 45 of 100 rows -> 5 .. 69; 60 .. 100 of 100 -> 36 .. 100.
    """
    rows = _whole_steps(end - start, x)
    first = max(0, min(start, x.shape[0] - rows))
    return first, min(first + rows, x.shape[0])


def _whole_steps(rows: int, x: Tensor) -> int:
    """So many rows, and as many more as make it a multiple of the step where oneDNN multiplies."""
    return rows if x.is_cuda or x.dtype == torch.float32 else -(-rows // _STEP) * _STEP
