# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Matrices in 8 bits with a scale for every tile: operands of the fp8 products (DeepSeek-V3, arXiv:2412.19437 §3.3).

    scale = max |value| of the tile / 448,    q = value / scale rounded to E4M3,    value is about q * scale

E4M3 has 3 bits of mantissa and reaches 448, so a value is off by at most 1/16 of itself, or 2**-10 of its scale. Tiles:

    quantise_rows      x (N, W)      1 x 128 along a row       q (N, Wp)       scale (N, Wp / 128)
    quantise_weight    w (E, O, I)   128 x 128                 q (E, O, Ip)    scale (E, Op / 128, Ip / 128)
           transposed                                          q (E, I, Op)    scale (E, Ip / 128, Op / 128)
    quantise_columns   x (R, W)      128 rows of one expert    q (W, 128 N)    scale (N, W)

Wp, Ip and Op are widths filled up to a multiple of 128 with zeros: the fp8 tensor cores of Hopper sum along the last
dimension of both operands only, and so a product's loop has whole steps at addresses that TMA takes, whatever the
sizes. `quantise_columns` is for the gradients of weights, which sum over rows: it transposes. The rows of an expert
start a tile of their own, the n-th of the `TileSchedule`, which has N; what fills its last one is zero.

Scales are fp32, not powers of two. A tile of zeros has the smallest one that is normal. DeepSeek's published code takes
1e-4 for the least maximum; the gradient of a mean over a batch's tokens lies below that as a whole, and would be zero.

Bytes: each value read once and written in one byte; some hundredths more for scales.

Example: in tiles of 2, x = 448 224 -> scale 1, q = 448 224; x = 1 0.3 -> scale 1 / 448, q = 448 136 (134.4 rounded),
and 136 / 448 = 0.304.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._triton import INTERPRETED, tl, triton
from .launching import launch
from .tiles import TileSchedule

__all__ = ["ROWS", "TILE", "Quantised", "allot", "quantise_columns", "quantise_rows", "quantise_weight", "quantised"]

TILE = 128
LARGEST = 448.0  # of E4M3
SMALLEST = 2.0**-126  # scale; the largest then is the smallest normal number's 448-fold


class Quantised(NamedTuple):
    """Values in torch.float8_e4m3fn and their fp32 scales; shapes at the top of the file."""

    values: Tensor
    scales: Tensor


# torch reference


def _quantise_torch(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """(q, scale) of fp32 x, a tile being all of `dims`, which the scale keeps with size 1."""
    largest = x.abs().amax(dims, keepdim=True).clamp(min=SMALLEST * LARGEST)
    return (x * torch.full_like(largest, LARGEST).div_(largest)).to(torch.float8_e4m3fn), largest / LARGEST


def _rows_torch(x: Tensor) -> Quantised:
    x = _filled(x.float(), 1).unflatten(1, (-1, TILE))
    q, scale = _quantise_torch(x, [2])
    return Quantised(q.flatten(1), scale.squeeze(2))


def _weight_torch(w: Tensor, transposed: bool) -> Quantised:
    w = w.float().transpose(1, 2) if transposed else w.float()
    n_out = w.shape[1]
    blocks = _filled(w, 1, 2).unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
    q, scale = _quantise_torch(blocks, [2, 4])
    return Quantised(q.flatten(3).flatten(1, 2)[:, :n_out].contiguous(), scale.squeeze(4).squeeze(2))


def _columns_torch(x: Tensor, tiles: TileSchedule, order: Tensor | None, top_k: int) -> Quantised:
    if not len(x):
        n_tiles, width = len(tiles.tiles_N3), x.shape[1]
        return Quantised(
            x.new_zeros(width, n_tiles * TILE, dtype=torch.float8_e4m3fn),
            x.new_zeros(n_tiles, width, dtype=torch.float32),
        )
    first, last = tiles.tiles_N3[:, 1:2], tiles.tiles_N3[:, 2:3]
    row = first + torch.arange(TILE, dtype=first.dtype, device=first.device)
    mine = row < last
    row = torch.where(mine, row, 0)
    source = row if order is None else order[row] // top_k
    q, scale = _quantise_torch(torch.where(mine[:, :, None], x[source].float(), 0.0), [1])
    return Quantised(q.permute(2, 0, 1).flatten(1).contiguous(), scale.squeeze(1))


def _filled(x: Tensor, *dims: int) -> Tensor:
    """`x` with zeros up to the next multiple of TILE in `dims`."""
    more = [0] * (2 * x.dim())
    for dim in dims:
        more[2 * (x.dim() - 1 - dim) + 1] = -x.shape[dim] % TILE
    return pad(x, more)


# kernels


@triton.jit
def largest_of(x, AXIS: tl.constexpr):
    """The largest magnitude of fp32 x along AXIS, or of all for None; NaN where there is one, as in torch: it is the
    largest as an integer, while a maximum of floats leaves it out. At least 448 * 2**-126, whose scale is normal."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    return tl.maximum(bits, 0x04E00000).to(tl.float32, bitcast=True)


@triton.jit
def quantised(x, largest, ROUND: tl.constexpr):
    """x over its scale in E4M3. ROUND: by hand first, to nearest even, for Triton's interpreter gets it wrong."""
    scaled = x * tl.div_rn(448.0, largest)
    if ROUND:
        bits = scaled.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (scaled + 24576.0) - 24576.0  # whose last bit is 2**-9
        scaled = tl.where(tl.abs(scaled) < 0.015625, subnormal, normal)
    return scaled.to(tl.float8e4nv)


@triton.jit
def quantise_rows_kernel(
    p_x,
    p_end,
    p_q,
    p_scale,
    n_rows,
    width,
    n_blocks,
    HAS_END: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ROUND: tl.constexpr,
):
    """BM rows of one block of BK columns."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    o_col = block * BK + tl.arange(0, BK)
    m_row = o_row < n_rows
    if HAS_END:
        m_row = m_row & (o_row < tl.load(p_end))
    row = o_row.to(tl.int64)
    x = tl.load(p_x + row[:, None] * width + o_col[None, :], mask=m_row[:, None] & (o_col < width)[None, :], other=0.0)
    x = x.to(tl.float32)
    largest = largest_of(x, 1)
    q = quantised(x, largest[:, None], ROUND)
    tl.store(p_q + row[:, None] * (n_blocks * BK) + o_col[None, :], q, mask=m_row[:, None])
    tl.store(p_scale + row * n_blocks + block, tl.div_rn(largest, 448.0), mask=m_row)


@triton.jit
def quantise_weight_kernel(
    p_w, p_q, p_scale, n_out, n_in, n_in_blocks, BK: tl.constexpr, TRANSPOSED: tl.constexpr, ROUND: tl.constexpr
):
    """One block of one expert; TRANSPOSED: stored the other way round, the values being the same."""
    expert = tl.program_id(1).to(tl.int64)
    out_block = tl.program_id(0) // n_in_blocks
    in_block = tl.program_id(0) % n_in_blocks
    o_out = out_block * BK + tl.arange(0, BK)
    o_in = in_block * BK + tl.arange(0, BK)
    m_out = (o_out < n_out)[:, None]
    m_in = (o_in < n_in)[None, :]
    p_wt = p_w + (expert * n_out + o_out[:, None]) * n_in + o_in[None, :]
    w = tl.load(p_wt, mask=m_out & m_in, other=0.0).to(tl.float32)
    largest = largest_of(w, None)
    q = quantised(w, largest, ROUND)
    n_out_blocks = tl.cdiv(n_out, BK)
    block = expert * n_out_blocks * n_in_blocks
    if TRANSPOSED:
        p_qt = p_q + (expert * n_in + o_in[:, None]) * (n_out_blocks * BK) + o_out[None, :]
        tl.store(p_qt, q.T, mask=(o_in < n_in)[:, None])
        block += in_block * n_out_blocks + out_block
    else:
        p_qt = p_q + (expert * n_out + o_out[:, None]) * (n_in_blocks * BK) + o_in[None, :]
        tl.store(p_qt, q, mask=m_out)
        block += out_block * n_in_blocks + in_block
    tl.store(p_scale + block, tl.div_rn(largest, 448.0))


@triton.jit
def quantise_columns_kernel(
    p_x,
    p_order,
    p_q,
    p_scale,
    p_tiles,
    p_count,
    width,
    n_rows,
    TOP_K: tl.constexpr,
    GATHERED: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    ROUND: tl.constexpr,
):
    """BC columns of one tile of the schedule, which may have fewer rows than BK; q is n_rows wide. GATHERED: x is read
    at order[r] // TOP_K."""
    tile = tl.program_id(0)
    if tile < tl.load(p_count):
        first = tl.load(p_tiles + tile * 3 + 1)
        last = tl.load(p_tiles + tile * 3 + 2)
        o_row = first + tl.arange(0, BK)
        m_row = o_row < last
        if GATHERED:
            o_row = tl.load(p_order + o_row, mask=m_row, other=0) // TOP_K
        o_col = tl.program_id(1) * BC + tl.arange(0, BC)
        m_col = o_col < width
        p_xt = p_x + o_row.to(tl.int64)[:, None] * width + o_col[None, :]
        x = tl.load(p_xt, mask=m_row[:, None] & m_col[None, :], other=0.0).to(tl.float32)
        largest = largest_of(x, 0)
        q = quantised(x, largest[None, :], ROUND)
        o_q = tile * BK + tl.arange(0, BK)
        tl.store(p_q + o_col.to(tl.int64)[:, None] * n_rows + o_q[None, :], q.T, mask=m_col[:, None])
        tl.store(p_scale + tile.to(tl.int64) * width + o_col, tl.div_rn(largest, 448.0), mask=m_col)


# launchers

ROWS, COLUMNS = 32, 64  # of a program: a tile then is 4096 or 8192 values, 32 or 64 a thread


def _rows_triton(x: Tensor, end: Tensor | None) -> Quantised:
    (n_rows, width), n_blocks = x.shape, triton.cdiv(x.shape[1], TILE)
    found = allot(x, (n_rows, n_blocks * TILE), (n_rows, n_blocks))
    if n_rows:
        grid = (triton.cdiv(n_rows, ROWS), n_blocks)
        args = (x, x if end is None else end, *found, n_rows, width, n_blocks)
        options = {"HAS_END": end is not None, "BM": ROWS, "BK": TILE, "ROUND": INTERPRETED}
        launch(quantise_rows_kernel, grid, *args, **options, num_warps=4)
    return found


def _weight_triton(w: Tensor, transposed: bool) -> Quantised:
    n_experts, n_out, n_in = w.shape
    out_blocks, in_blocks = triton.cdiv(n_out, TILE), triton.cdiv(n_in, TILE)
    if transposed:
        found = allot(w, (n_experts, n_in, out_blocks * TILE), (n_experts, in_blocks, out_blocks))
    else:
        found = allot(w, (n_experts, n_out, in_blocks * TILE), (n_experts, out_blocks, in_blocks))
    launch(
        quantise_weight_kernel, (out_blocks * in_blocks, n_experts), w, *found, n_out, n_in, in_blocks,
        BK=TILE, TRANSPOSED=transposed, ROUND=INTERPRETED, num_warps=8,
    )  # fmt: skip
    return found


def _columns_triton(x: Tensor, tiles: TileSchedule, order: Tensor | None, top_k: int) -> Quantised:
    width, n_tiles = x.shape[1], len(tiles.tiles_N3)
    found = allot(x, (width, n_tiles * TILE), (n_tiles, width))
    if n_tiles:
        args = (x, order, *found, tiles.tiles_N3, tiles.count_1, width, n_tiles * TILE)
        options = {"TOP_K": top_k, "GATHERED": order is not None, "BK": TILE, "BC": COLUMNS, "ROUND": INTERPRETED}
        launch(quantise_columns_kernel, (n_tiles, triton.cdiv(width, COLUMNS)), *args, **options, num_warps=4)
    return found


def allot(like: Tensor, values: tuple[int, ...], scales: tuple[int, ...]) -> Quantised:
    """Room for values and scales of these shapes, on the device of `like`."""
    return Quantised(like.new_empty(values, dtype=torch.float8_e4m3fn), like.new_empty(scales, dtype=torch.float32))


# by backend


def quantise_rows(x: Tensor, backend: str, end: Tensor | None = None) -> Quantised:
    """Of contiguous x (N, W) of any floating dtype, for products that sum along its rows.

    end: (1,) where rows begin that hold anything, and may afterwards; of null experts.
    """
    return _rows_triton(x, end) if backend == "triton" else _rows_torch(x)


def quantise_weight(w: Tensor, transposed: bool, backend: str) -> Quantised:
    """Of contiguous w (E, O, I), for a product that sums over I, or when transposed over O."""
    return _weight_triton(w, transposed) if backend == "triton" else _weight_torch(w, transposed)


def quantise_columns(
    x: Tensor, tiles: TileSchedule, backend: str, order: Tensor | None = None, top_k: int = 1
) -> Quantised:
    """Of contiguous x (R, W), transposed, or of x (T, W) with a row per token, which row r reads at order[r] // top_k.

    tiles: of 128 rows. What lies in q behind the last that is counted is anything.
    """
    assert tiles.block == TILE
    run = _columns_triton if backend == "triton" else _columns_torch
    return run(x, tiles, order, top_k)
