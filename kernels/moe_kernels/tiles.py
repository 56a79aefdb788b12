# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Which rows of which expert each program multiplies: a list of tiles, made on the device from the offsets.

    tiles_N3   int32   (expert, first row, one past the last row), at most BM rows of one expert each
    count_1    int32   how many of the N there are: sum_e ceil(rows[e] / BM)

The host knows R and E but not who chose whom, so it allots N = ceil(R / BM) + E - 1, the most there can be, and never
reads the count. A product of C column tiles then has count * C programs' work, and `tile_of` says which is which.

Order: GROUP row tiles go through the column tiles side by side. 132 programs running together then share about 8 row
tiles of x and 16 column tiles of w, and what one of them brings into the L2 cache serves the others. Column tiles alone
would sweep a wide expert's whole weight (Mixtral: 235 MB, more than the 50 MB of L2) once for every 128 rows: 128 FLOP
a byte of memory, where an H200 wants 181.

Bytes: 4 (E + 1) read by each of E programs from L2, 12 N written; nothing against a product, a launch of 3 us counts.

Example: BM = 2, offsets 0 3 3 4 -> tiles (0, 0, 2) (0, 2, 3) (2, 3, 4), count 3 of N = 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .launching import launch

__all__ = ["GROUP", "TileSchedule", "schedule_tiles", "schedule_tiles_torch", "side_by_side", "tile_of"]

GROUP = 8  # row tiles side by side


class TileSchedule(NamedTuple):
    """What `schedule_tiles` returns; described at the top of the file."""

    tiles_N3: Tensor
    count_1: Tensor
    block: int  # BM


@triton.jit
def tile_schedule_kernel(p_offsets, p_tiles, p_count, n_experts, BM: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """The tiles of one expert per program, which adds up those of the experts before it by itself."""
    expert = tl.program_id(0)
    o_e = tl.arange(0, BE)
    m_e = o_e < n_experts
    rows = tl.load(p_offsets + 1 + o_e, mask=m_e, other=0) - tl.load(p_offsets + o_e, mask=m_e, other=0)
    tiles = (rows + BM - 1) // BM
    before = tl.sum(tl.where(o_e < expert, tiles, 0), 0)
    if expert == 0:
        tl.store(p_count, tl.sum(tiles, 0))
    start = tl.load(p_offsets + expert)
    end = tl.load(p_offsets + expert + 1)
    for tile in range(0, tl.cdiv(end - start, BM), BT):
        o_t = tile + tl.arange(0, BT)
        first = start + o_t * BM
        mask = first < end
        p_tile = p_tiles + (before + o_t) * 3
        tl.store(p_tile, tl.zeros_like(first) + expert, mask=mask)
        tl.store(p_tile + 1, first, mask=mask)
        tl.store(p_tile + 2, tl.minimum(first + BM, end), mask=mask)


@triton.jit
def side_by_side(work, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a number below n_row_tiles * n_col_tiles.

    Example: 3 x 2 tiles, GROUP = 2 -> (0, 0) (1, 0) (0, 1) (1, 1) (2, 0) (2, 1).
    """
    per_group = GROUP * n_col_tiles
    first = work // per_group * GROUP
    in_group = tl.minimum(n_row_tiles - first, GROUP)
    within = work % per_group
    return first + within % in_group, within // in_group


@triton.jit
def tile_of(work, p_tiles, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """(expert, first row, one past the last row, column tile) of a number below n_row_tiles * n_col_tiles."""
    row_tile, col_tile = side_by_side(work, n_row_tiles, n_col_tiles, GROUP)
    p_tile = p_tiles + row_tile * 3
    return tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), col_tile


def schedule_tiles(offsets: Tensor, n_rows: int, block: int) -> TileSchedule:
    """The tiles of at most `block` rows each; offsets (E + 1,) int32, their last at most n_rows."""
    n_experts = offsets.numel() - 1
    most = triton.cdiv(n_rows, block) + n_experts - 1
    tiles, count = offsets.new_empty(most, 3), offsets.new_empty(1)
    args = (offsets, tiles, count, n_experts)
    block_e = triton.next_power_of_2(n_experts)
    launch(tile_schedule_kernel, (n_experts,), *args, BM=block, BE=block_e, BT=128, num_warps=4)
    return TileSchedule(tiles, count, block)


def schedule_tiles_torch(offsets: Tensor, n_rows: int, block: int) -> TileSchedule:
    """The same in torch; what it allots and does not need has no rows."""
    n_experts = offsets.numel() - 1
    ends = ((offsets.diff() + block - 1) // block).cumsum(0)  # of each expert's tiles
    tile = torch.arange(-(-n_rows // block) + n_experts - 1, device=offsets.device)
    expert = torch.searchsorted(ends, tile, right=True).clamp(max=n_experts - 1)
    first_tile = ends[expert] - (offsets.diff()[expert] + block - 1) // block
    first = offsets[expert] + (tile - first_tile) * block
    last = torch.minimum(first + block, offsets[expert + 1])
    tiles = torch.stack([expert, first, last], 1) * (tile < ends[-1]).unsqueeze(1)
    return TileSchedule(tiles.to(torch.int32), ends[-1:].to(torch.int32), block)
