"""The grouped products of quantised operands: what `gemm.py` computes, from 8 bits with a scale for every 128 numbers.

    product    y[r]  = x[r] @ w[e(r)].T      x by rows, w by blocks (`quantise.py`) -> y (R, O)
    wgrad      dw[e] = sum over rows r of e: dy[r].T x[r]      both by columns -> (E, O, I), zero without rows

The gradient of rows is `product` with the weight quantised transposed. Sums are fp32 in steps of 128, however they are
multiplied: the torch reference multiplies the values that the 8 bits stand for in fp32, which is slow, for it is made
to be read and compared with. Letters are those of `gemm.py`.

Tiles of the result, counted for Hopper as in `configs.py`: 8-bit operands make M N / (M + N) multiplications of each
byte, and the tensor cores do 4,096 a cycle: 128 x 128 wants 64 bytes a cycle from L2, as in 16 bits. The step's own sum
takes as many registers as the accumulator, so 128 x 256 does not fit.
"""

import torch
from torch import Tensor

from . import gemm_torch
from ._triton import INTERPRETED, triton
from .configs import Config, capability_of, n_programs
from .fp8_kernels import (
    fp8_product_kernel,
    fp8_wgrad_kernel,
    swiglu_quantise_kernel,
    swiglu_rows_backward_kernel,
)
from .launching import launch
from .quantise import ROWS, TILE, Quantised, allot, quantise_rows
from .swiglu import swiglu_backward, swiglu_forward
from .tiles import GROUP, TileSchedule

__all__ = ["product", "starts_of", "swiglu_gradient", "swiglu_quantised", "wgrad"]

# Compute capability 8.9 has no TMA, and 99 KiB: three buffers of 24 KiB fit.
_TMA, _POINTERS = Config(128, 128, TILE, 8, 4, 1, tma=True), Config(128, 64, TILE, 8, 3, 1)


def starts_of(offsets: Tensor) -> Tensor:
    """(E + 1,) int32: each expert's first tile of 128 rows.

    Example: offsets 0 130 130 131 -> 0 2 2 3.
    """
    tiles = (offsets.diff() + TILE - 1) // TILE
    return torch.nn.functional.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))


# torch reference


def _product_torch(
    x: Quantised, w: Quantised, offsets: Tensor, dtype: torch.dtype, order: Tensor | None, top_k: int
) -> Tensor:
    rows = _spread(x.values, x.scales)
    if order is not None:
        rows = rows.index_select(0, order // top_k)
    blocks = w.scales.repeat_interleave(TILE, 1)[:, : w.values.shape[1]]
    weight = w.values.float().unflatten(2, (-1, TILE)).mul_(blocks.unsqueeze(3)).flatten(2)
    return gemm_torch.forward(rows, weight, offsets).to(dtype)


def _wgrad_torch(dy: Quantised, x: Quantised, starts: Tensor, dtype: torch.dtype) -> Tensor:
    dy_rows, x_rows = (_spread(side.values, side.scales.t()).t().contiguous() for side in (dy, x))
    return gemm_torch.wgrad(dy_rows, x_rows, starts * TILE, dtype)


def _spread(values: Tensor, scales: Tensor) -> Tensor:
    """What values (N, 128 B) with scales (N, B) stand for, in fp32."""
    return values.float().unflatten(1, (-1, TILE)).mul_(scales.unsqueeze(2)).flatten(1)


# launchers


def _product_triton(
    x: Quantised, w: Quantised, tiles: TileSchedule, y: Tensor, order: Tensor | None, top_k: int
) -> Tensor:
    config = _config(y)
    n_experts, n_out, n_in = w.values.shape
    if y.numel():
        work = len(tiles.tiles_N3) * triton.cdiv(n_out, config.cols)
        args = (*x, *w, order, y, tiles.tiles_N3, tiles.count_1, len(x.values), n_experts, n_in, n_out)
        launch(
            fp8_product_kernel, (n_programs(config, y.device, work),), *args,
            TOP_K=top_k, GATHERED=order is not None, BM=config.rows, BN=config.cols, BK=config.step, GROUP=GROUP,
            TMA=config.tma, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def _wgrad_triton(dy: Quantised, x: Quantised, starts: Tensor, dw: Tensor) -> Tensor:
    config = _config(dw)
    n_experts, n_out, n_in = dw.shape
    n_rows = dy.values.shape[1]
    if not n_rows:
        return dw.zero_()
    work = n_experts * triton.cdiv(n_out, config.rows) * triton.cdiv(n_in, config.cols)
    launch(
        fp8_wgrad_kernel, (n_programs(config, dw.device, work),), *dy, *x, dw, starts, n_rows, n_experts, n_out, n_in,
        BO=config.rows, BI=config.cols, BR=config.step, GROUP=GROUP, TMA=config.tma,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return dw


def _config(result: Tensor) -> Config:
    return _TMA if capability_of(result.device)[0] in (9, 10) else _POINTERS


def _swiglu_quantised_triton(h: Tensor, order: Tensor, weight: Tensor, end: Tensor) -> Quantised:
    n_rows, hidden = h.shape[0], h.shape[1] // 2
    n_blocks = triton.cdiv(hidden, TILE)
    found = allot(h, (n_rows, n_blocks * TILE), (n_rows, n_blocks))
    if n_rows:
        args = (h, order, weight, end, *found, hidden, n_blocks)
        grid = (triton.cdiv(n_rows, ROWS), n_blocks)
        launch(swiglu_quantise_kernel, grid, *args, BM=ROWS, BK=TILE, ROUND=INTERPRETED, num_warps=4)
    return found


def _swiglu_gradient_triton(
    q: Tensor, h: Tensor, order: Tensor, weight: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, hidden = q.shape
    dh, wa = torch.empty_like(h), torch.empty_like(q)
    d_weight = torch.empty(n_rows, dtype=torch.float32, device=h.device)
    if n_rows:
        args = (q, h, order, weight, end, dh, wa, d_weight, hidden)
        launch(swiglu_rows_backward_kernel, (triton.cdiv(n_rows, 16),), *args, BM=16, BN=TILE, num_warps=4)
    return dh, wa, d_weight


# by backend


def product(
    x: Quantised,
    w: Quantised,
    tiles: TileSchedule,
    offsets: Tensor,
    dtype: torch.dtype,
    backend: str,
    order: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """y (R, O) in `dtype`. With `order` x has a row per token, which row r reads at order[r] // top_k.

    Rows behind the last group hold anything.
    """
    if backend == "triton":
        n_rows = len(x.values if order is None else order)
        y = x.scales.new_empty(n_rows, w.values.shape[1], dtype=dtype)
        return _product_triton(x, w, tiles, y, order, top_k)
    return _product_torch(x, w, offsets, dtype, order, top_k)


def wgrad(dy: Quantised, x: Quantised, starts: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """dw (E, O, I) in `dtype` of dy (O, 128 N) and x (I, 128 N), quantised by columns in the same tiles."""
    if backend == "triton":
        shape = (len(starts) - 1, len(dy.values), len(x.values))
        return _wgrad_triton(dy, x, starts, x.scales.new_empty(shape, dtype=dtype))
    return _wgrad_torch(dy, x, starts, dtype)


def swiglu_quantised(h: Tensor, order: Tensor, weight: Tensor, end: Tensor, backend: str) -> Quantised:
    """weight silu(gate) up of h (R, 2F), rounded to h's dtype and then quantised by rows; weight (T K,) fp32.

    end: (1,) where the rows of null experts begin, which hold anything, before and after.
    """
    if backend == "triton":
        return _swiglu_quantised_triton(h, order, weight, end)
    return quantise_rows(swiglu_forward(h, weight[order]), backend)


def swiglu_gradient(
    q: Tensor, h: Tensor, order: Tensor, weight: Tensor, end: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh (R, 2F), wa (R, F), dweight (T K,) fp32) of q (R, F), h (R, 2F) and weight (T K,) fp32; `end` as above."""
    if backend == "triton":
        return _swiglu_gradient_triton(q, h, order, weight, end)
    dh, wa, dw_rows = swiglu_backward(q, h, weight[order])
    d_weight = torch.empty_like(dw_rows)
    d_weight[order] = dw_rows
    return dh, wa, d_weight
