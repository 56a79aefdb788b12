"""Matrix products over ragged groups of rows: rows offsets[e] .. offsets[e+1] of x meet weight e.

    forward   y[r]  = x[r] @ w[e(r)].T            x (R, I), w (E, O, I) -> y (R, O)
    dgrad     dx[r] = dy[r] @ w[e(r)]             -> (R, I)
    wgrad     dw[e] = sum over rows r of e: dy[r].T x[r]        -> (E, O, I), zero for an expert without rows

Weights lie as Hugging Face stores them: gate_up (E, 2F, D) and down (E, D, F). Products accumulate in fp32.
Letters: R rows, I inputs, O outputs, E experts.

Example: offsets 0 2 2 3 with one input and one output, w = 10 20 30, x = 1 2 3 -> y = 10 20 90; with dy = 1 1 1,
dw = 3 0 3.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .backend import resolve
from .errors import KernelError

__all__ = ["grouped_gemm"]


def grouped_gemm(x_RI: Tensor, w_EOI: Tensor, offsets_E1: Tensor, *, backend: str | None = None) -> Tensor:
    """y_RO: each row times the transposed weight of its expert, differentiable in x and w.

    offsets_E1: int32, as `sort_by_expert` returns it. x and w share one dtype (fp32, bf16, fp16).
    """
    if x_RI.dtype != w_EOI.dtype:
        raise KernelError(f"x_RI is {x_RI.dtype} and w_EOI {w_EOI.dtype}: cast one of them")
    if w_EOI.dim() != 3 or x_RI.dim() != 2 or x_RI.shape[1] != w_EOI.shape[2]:
        raise KernelError(
            f"x_RI {tuple(x_RI.shape)} and w_EOI {tuple(w_EOI.shape)} do not fit: give (rows, inputs) and "
            "(experts, outputs, inputs)"
        )
    if offsets_E1.shape != (w_EOI.shape[0] + 1,):
        raise KernelError(f"offsets_E1 has shape {tuple(offsets_E1.shape)}: give ({w_EOI.shape[0] + 1},)")
    return _grouped_gemm(x_RI, w_EOI, offsets_E1, resolve(backend, x_RI.device))


# torch reference


def _fits_grouped_mm(*tensors: Tensor) -> bool:
    """Whether torch's grouped_mm takes these row-major tensors: rows of 16 bytes, aligned, on CUDA bf16 only."""
    for t in tensors:
        if t.numel() == 0 or t.shape[-1] * t.element_size() % 16 or t.data_ptr() % 16:
            return False
        if t.dtype not in (torch.bfloat16, torch.float32) or (t.is_cuda and t.dtype != torch.bfloat16):
            return False
    return True


def _forward_torch(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    if _fits_grouped_mm(x, w):
        return torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])
    y = x.new_zeros(x.shape[0], w.shape[1])
    for e, (start, end) in _groups(offsets):
        torch.mm(x[start:end], w[e].t(), out=y[start:end])
    return y


def _dgrad_torch(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    if _fits_grouped_mm(dy, w):
        return torch.nn.functional.grouped_mm(dy, w, offs=offsets[1:])
    dx = dy.new_zeros(dy.shape[0], w.shape[2])
    for e, (start, end) in _groups(offsets):
        torch.mm(dy[start:end], w[e], out=dx[start:end])
    return dx


def _wgrad_torch(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    if _fits_grouped_mm(dy, x):
        dw = torch.nn.functional.grouped_mm(dy.t(), x, offs=offsets[1:])
        if dw.is_cuda:  # experts without rows: not promised to be written
            dw.masked_fill_((offsets[1:] == offsets[:-1])[:, None, None], 0)
        return dw.to(out_dtype)
    dw = dy.new_zeros(offsets.numel() - 1, dy.shape[1], x.shape[1])
    for e, (start, end) in _groups(offsets):
        torch.mm(dy[start:end].t(), x[start:end], out=dw[e])
    return dw.to(out_dtype)


def _groups(offsets: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """(expert, (first row, one past the last)) of every expert that has rows; reads the offsets on the host."""
    bounds = offsets.tolist()
    return [(e, (start, end)) for e, (start, end) in enumerate(pairwise(bounds)) if end > start]


# by backend; what the library ops of this package are built from


def gemm_forward(x: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """y (R, O) of contiguous x (R, I) and w (E, O, I)."""
    return _forward_torch(x, w, offsets)


def gemm_dgrad(dy: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """dx (R, I) of contiguous dy (R, O) and w (E, O, I)."""
    return _dgrad_torch(dy, w, offsets)


def gemm_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I)."""
    return _wgrad_torch(dy, x, offsets, out_dtype)


# library op


@torch.library.custom_op("moe_kernels::grouped_gemm", mutates_args=())
def _grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return gemm_forward(x.contiguous(), w.contiguous(), offsets, backend)


@_grouped_gemm.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


@torch.library.custom_op("moe_kernels::grouped_gemm_backward", mutates_args=())
def _grouped_gemm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, need_x: bool, need_w: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()  # grouped_mm refuses expanded gradients
    dx = gemm_dgrad(dy, w.contiguous(), offsets, backend) if need_x else dy.new_empty(0)
    dw = gemm_wgrad(dy, x.contiguous(), offsets, w.dtype, backend) if need_w else dy.new_empty(0)
    return dx, dw


@_grouped_gemm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, need_x: bool, need_w: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        w.new_empty(w.shape if need_w else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, offsets, backend = inputs
    ctx.save_for_backward(x, w, offsets)
    ctx.backend = backend


def _backward(ctx: Any, dy: Tensor) -> tuple:
    need_x, need_w = ctx.needs_input_grad[:2]
    dx, dw = _grouped_gemm_backward(dy, *ctx.saved_tensors, need_x, need_w, ctx.backend)
    return dx if need_x else None, dw if need_w else None, None, None


_grouped_gemm.register_autograd(_backward, setup_context=_setup_context)
