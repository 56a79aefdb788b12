"""Matrix products over ragged groups of rows: rows offsets[e] .. offsets[e+1] of x meet weight e.

    forward   y[r]  = x[r] @ w[e(r)].T            x (R, I), w (E, O, I) -> y (R, O)
    dgrad     dx[r] = dy[r] @ w[e(r)]             -> (R, I)
    wgrad     dw[e] = sum over rows r of e: dy[r].T x[r]        -> (E, O, I), zero for an expert without rows

Weights lie as Hugging Face stores them: gate_up (E, 2F, D) and down (E, D, F). Products accumulate in fp32.
Letters: R rows, I inputs, O outputs, E experts.

`gemm_torch.py` is the reference, `gemm_triton.py` launches the kernels of `grouped_kernels.py`.

Example: offsets 0 2 2 3 with one input and one output, w = 10 20 30, x = 1 2 3 -> y = 10 20 90; with dy = 1 1 1,
dw = 3 0 3.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import gemm_torch, gemm_triton
from .agreement import Check, Side, normal, widths
from .backend import register_check, resolve
from .configs import families, row_block
from .errors import KernelError
from .tiles import TileSchedule, schedule_tiles

__all__ = ["grouped_gemm"]


def grouped_gemm(x_RI: Tensor, w_EOI: Tensor, offsets_E1: Tensor, *, backend: str | None = None) -> Tensor:
    """y_RO: each row times the transposed weight of its expert, differentiable in x and w.

    offsets_E1: int32, as `sort_by_expert` returns it. x and w share one dtype (fp32, bf16, fp16). No host sync but in
    the torch backend on CUDA for what its grouped_mm does not take (all but bf16 with rows of 16 bytes).
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
    return _grouped_gemm(x_RI, w_EOI, offsets_E1, resolve(backend, x_RI.device, "grouped_gemm", x_RI.dtype))


# by backend


def gemm_forward(x: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """y (R, O) of contiguous x (R, I) and w (E, O, I), in x's dtype."""
    if backend == "triton":
        return gemm_triton.product(x, w.to(x.dtype), _tiles(x, offsets), False)
    return gemm_torch.forward(x, w, offsets)


def gemm_dgrad(dy: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """dx (R, I) of contiguous dy (R, O) and w (E, O, I), in dy's dtype."""
    if backend == "triton":
        return gemm_triton.product(dy, w.to(dy.dtype), _tiles(dy, offsets), True)
    return gemm_torch.dgrad(dy, w, offsets)


def gemm_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I)."""
    if backend == "triton":
        return gemm_triton.wgrad(dy, x, offsets, out_dtype, _block(x, offsets))
    return gemm_torch.wgrad(dy, x, offsets, out_dtype)


def _block(x: Tensor, offsets: Tensor) -> int:
    return row_block(x.dtype, len(x), len(offsets) - 1)


def _tiles(x: Tensor, offsets: Tensor) -> TileSchedule:
    return schedule_tiles(offsets, len(x), _block(x, offsets))


# library op


@torch.library.custom_op("moe_kernels::grouped_gemm", mutates_args=())
def _grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return gemm_forward(x.contiguous(), w, offsets, backend)


@_grouped_gemm.register_fake
def _(x: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


@torch.library.custom_op("moe_kernels::grouped_gemm_backward", mutates_args=())
def _grouped_gemm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, need_x: bool, need_w: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()  # grouped_mm refuses expanded gradients
    dx = gemm_dgrad(dy, w, offsets, backend) if need_x else dy.new_empty(0)
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


# self-check


def _probe(side: Side) -> dict[str, Tensor | None]:
    """One expert has more rows than a tile; others have few, one or none. Weights lie either way round."""
    g = torch.Generator().manual_seed(0)
    rows_of = {16: [0, 1, 70, 0, 5, 17, 11, 3, 2, 2, 0, 0], 64: [0, 3, 150, 64], 128: [400, 133]}
    found: dict[str, Tensor | None] = {}
    for (block, aligned), transposed in product(families(side.tested_dtype), (False, True)):
        rows, (n_out, n_in) = rows_of[block], widths(block, aligned)
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(rows).cumsum(0)
        x = side.leaf(normal(sum(rows), n_in, make=g))
        w = side.leaf(normal(len(rows), *((n_in, n_out) if transposed else (n_out, n_in)), make=g) / n_in**0.5)
        w_EOI = w.transpose(1, 2) if transposed else w
        y = _grouped_gemm(x, w_EOI, offsets.to(side.device), side.backend)
        y.backward(side.put(normal(sum(rows), n_out, make=g)), inputs=[x, w])
        where = f"of {block}-row tiles, {n_in} by {n_out}{', transposed weights' if transposed else ''}"
        found |= {f"{name} {where}": t for name, t in (("y", y), ("dx", x.grad), ("dw", w.grad))}
    return found


register_check(Check("grouped_gemm", _probe))
