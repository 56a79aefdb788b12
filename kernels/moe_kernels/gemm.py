# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Matrix products over ragged groups of rows: rows offsets[e] .. offsets[e+1] of x meet weight e.

    forward   y[r]  = x[r] @ w[e(r)].T            x (R, I), w (E, O, I) -> y (R, O)
    dgrad     dx[r] = dy[r] @ w[e(r)]             -> (R, I)
    wgrad     dw[e] = sum over rows r of e: dy[r].T x[r]        -> (E, O, I), zero for an expert without rows

Weights lie as Hugging Face stores them: gate_up (E, 2F, D) and down (E, D, F). Products accumulate in fp32.
Letters: R rows, I inputs, O outputs, E experts.

`gemm_torch.py` is the reference.

Example: offsets 0 2 2 3 with one input and one output, w = 10 20 30, x = 1 2 3 -> y = 10 20 90; with dy = 1 1 1,
dw = 3 0 3.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gemm_torch
from ._triton import on_device_of, tl, triton
from .agreement import Check, D, F, Side
from .backend import register_check, resolve
from .errors import KernelError

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
    return _grouped_gemm(x_RI, w_EOI, offsets_E1, resolve(backend, x_RI.device))


# kernels


@triton.jit
def grouped_gemm_kernel(
    p_x,
    p_w,
    p_y,
    p_offsets,
    n_experts,
    n_out,
    n_in,
    s_we,
    s_wo,
    s_wi,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[r, o] = sum_i x[r, i] w[e(r), o, i], one (BM, BN) tile of y per program; dgrad swaps the strides of w.

    Each program finds its expert from the offsets, so the host never reads them: with tiles[e] = ceil(rows[e] / BM),
    tile t belongs to the first expert whose cumulated tiles exceed t. The grid holds the upper bound R/BM + E of them;
    the surplus returns. Example: BM = 2, offsets 0 3 3 4 -> tiles 2 0 1, cumulated 2 2 3: tile 0 and 1 are rows 0 and 2
    of expert 0, tile 2 is row 3 of expert 2, tile 3 is surplus.
    """
    n_col_tiles = tl.cdiv(n_out, BN)
    pid = tl.program_id(0)
    tile = pid // n_col_tiles
    o_e = tl.arange(0, BE)
    m_e = o_e < n_experts
    first = tl.load(p_offsets + o_e, mask=m_e, other=0)
    last = tl.load(p_offsets + 1 + o_e, mask=m_e, other=0)
    tiles = (last - first + BM - 1) // BM
    expert = tl.sum(((tl.cumsum(tiles, 0) <= tile) & m_e).to(tl.int32), 0)
    if expert == n_experts:
        return
    tile_in_expert = tile - tl.sum(tl.where(o_e < expert, tiles, 0), 0)
    end = tl.load(p_offsets + expert + 1)
    o_row = tl.load(p_offsets + expert) + tile_in_expert * BM + tl.arange(0, BM)
    o_out = (pid % n_col_tiles) * BN + tl.arange(0, BN)
    o_in = tl.arange(0, BK)
    m_row = (o_row < end)[:, None]
    m_out = (o_out < n_out)[None, :]
    # Surplus rows read row 0 and are never stored. Columns are masked: they may be the contiguous direction of w,
    # and a wrapped index would hide that from the compiler, which then neither vectorises nor pipelines the load.
    row = tl.where(o_row < end, o_row, 0).to(tl.int64)
    p_xt = p_x + row[:, None] * n_in + o_in[None, :]
    p_wt = p_w + expert.to(tl.int64) * s_we + o_out[None, :].to(tl.int64) * s_wo + o_in[:, None].to(tl.int64) * s_wi
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(0, n_in, BK):
        m_in = o_in < n_in - i
        b_x = tl.load(p_xt, mask=m_in[None, :], other=0.0)
        b_w = tl.load(p_wt, mask=m_in[:, None] & m_out, other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
        p_xt += BK
        p_wt += BK * s_wi
    p_yt = p_y + o_row[:, None].to(tl.int64) * n_out + o_out[None, :]
    tl.store(p_yt, acc.to(p_y.dtype.element_ty), mask=m_row & m_out)


@triton.jit
def grouped_wgrad_kernel(
    p_dy,
    p_x,
    p_dw,
    p_offsets,
    n_out,
    n_in,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[e, o, i] = sum over the rows r of e of dy[r, o] x[r, i], one (BO, BI) tile per program, zeros without rows."""
    n_in_tiles = tl.cdiv(n_in, BI)
    n_tiles = tl.cdiv(n_out, BO) * n_in_tiles
    pid = tl.program_id(0)
    expert = pid // n_tiles
    tile = pid % n_tiles
    start = tl.load(p_offsets + expert)
    end = tl.load(p_offsets + expert + 1)
    o_out = (tile // n_in_tiles) * BO + tl.arange(0, BO)
    o_in = (tile % n_in_tiles) * BI + tl.arange(0, BI)
    o_row = tl.arange(0, BR)
    m_out = o_out < n_out
    m_in = o_in < n_in
    first = start + o_row.to(tl.int64)
    p_dyt = p_dy + first[None, :] * n_out + o_out[:, None]
    p_xt = p_x + first[:, None] * n_in + o_in[None, :]
    acc = tl.zeros((BO, BI), dtype=tl.float32)
    for r in range(start, end, BR):
        m_row = o_row < end - r
        b_dy = tl.load(p_dyt, mask=m_out[:, None] & m_row[None, :], other=0.0)
        b_x = tl.load(p_xt, mask=m_row[:, None] & m_in[None, :], other=0.0)
        acc = tl.dot(b_dy, b_x, acc, input_precision=PRECISION)
        p_dyt += tl.cast(BR, tl.int64) * n_out
        p_xt += tl.cast(BR, tl.int64) * n_in
    p_dwt = p_dw + (expert.to(tl.int64) * n_out + o_out[:, None]) * n_in + o_in[None, :]
    tl.store(p_dwt, acc.to(p_dw.dtype.element_ty), mask=m_out[:, None] & m_in[None, :])


# launchers


class GemmConfig(NamedTuple):
    """Tile of the result (rows, columns), step along the sum, and how many warps and pipeline stages work on it."""

    rows: int
    cols: int
    step: int
    num_warps: int
    num_stages: int
    precision: str


def gemm_config(dtype: torch.dtype) -> GemmConfig:
    """The configuration of both kernels; fp32 is multiplied in fp32 (`ieee`), not TF32, hence smaller tiles."""
    if dtype == torch.float32:
        return GemmConfig(64, 64, 32, 8, 2, "ieee")
    return GemmConfig(128, 128, 64, 8, 3, "tf32")


def _launch_gemm(x: Tensor, w: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """x @ w[e].T, or x @ w[e] when transposed."""
    n_experts, n_out, n_in = w.shape
    s_we, s_wo, s_wi = w.stride()
    if transposed:
        n_out, n_in, s_wo, s_wi = n_in, n_out, s_wi, s_wo
    y = x.new_empty(x.shape[0], n_out)
    if y.numel() == 0:
        return y
    config = gemm_config(x.dtype)
    tiles = triton.cdiv(x.shape[0], config.rows) + n_experts
    with on_device_of(x):
        grouped_gemm_kernel[(tiles * triton.cdiv(n_out, config.cols),)](
            x,
            w,
            y,
            offsets,
            n_experts,
            n_out,
            n_in,
            s_we,
            s_wo,
            s_wi,
            BE=triton.next_power_of_2(n_experts),
            BM=config.rows,
            BN=config.cols,
            BK=config.step,
            PRECISION=config.precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def _launch_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    n_experts, n_out, n_in = offsets.numel() - 1, dy.shape[1], x.shape[1]
    dw = torch.empty(n_experts, n_out, n_in, dtype=out_dtype, device=x.device)
    if dw.numel() == 0:
        return dw
    config = gemm_config(x.dtype)
    tiles = triton.cdiv(n_out, config.rows) * triton.cdiv(n_in, config.cols)
    with on_device_of(x):
        grouped_wgrad_kernel[(n_experts * tiles,)](
            dy,
            x,
            dw,
            offsets,
            n_out,
            n_in,
            BO=config.rows,
            BI=config.cols,
            BR=config.step,
            PRECISION=config.precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dw


# by backend; what the library ops of this package are built from


def gemm_forward(x: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """y (R, O) of contiguous x (R, I) and w (E, O, I), in x's dtype."""
    w = _as_multiplied(w, x)
    return _launch_gemm(x, w, offsets, False) if backend == "triton" else gemm_torch.forward(x, w, offsets)


def gemm_dgrad(dy: Tensor, w: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """dx (R, I) of contiguous dy (R, O) and w (E, O, I), in dy's dtype."""
    w = _as_multiplied(w, dy)
    return _launch_gemm(dy, w, offsets, True) if backend == "triton" else gemm_torch.dgrad(dy, w, offsets)


def _as_multiplied(w: Tensor, x: Tensor) -> Tensor:
    """Contiguous weights in x's dtype; on a CPU in their own, for there they are cast one by one."""
    return (w if x.device.type == "cpu" else w.to(x.dtype)).contiguous()


def gemm_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I)."""
    run = _launch_wgrad if backend == "triton" else gemm_torch.wgrad
    return run(dy, x, offsets, out_dtype)


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
    """One expert has more rows than a tile; others have few, one or none."""
    g = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, 1, 130, 0, 5, 17, 11, 3, 2, 2, 0, 0])
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int32)
    offsets[1:] = rows.cumsum(0)
    n_rows = int(offsets[-1])
    x = side.leaf(torch.randn(n_rows, D, generator=g))
    w = side.leaf(torch.randn(len(rows), 2 * F, D, generator=g) / D**0.5)
    y = _grouped_gemm(x, w, offsets.to(side.device), side.backend)
    y.backward(side.put(torch.randn(n_rows, 2 * F, generator=g)), inputs=[x, w])
    return {"y": y, "dx": x.grad, "dw": w.grad}


register_check(Check("grouped_gemm", _probe))
