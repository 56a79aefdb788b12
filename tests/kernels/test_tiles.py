"""The schedule of tiles: every row once, in the order the docstrings show."""

from itertools import pairwise

import pytest
import torch

from moe_kernels._triton import tl, triton
from moe_kernels.tiles import schedule_tiles, side_by_side

pytestmark = pytest.mark.interpreter


def scheduled(offsets: list[int], n_rows: int, block: int) -> list[list[int]]:
    """The tiles that the count says are there."""
    tiles, count, height = schedule_tiles(torch.tensor(offsets, dtype=torch.int32), n_rows, block)
    assert height == block
    assert int(count) <= len(tiles)
    return tiles[: int(count)].tolist()


def test_worked_example() -> None:
    """BM = 2 and offsets 0 3 3 4: three tiles of four."""
    assert scheduled([0, 3, 3, 4], 4, 2) == [[0, 0, 2], [0, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize("rows", [[0], [1], [0, 0, 5], [7, 0, 1, 300, 16], [3] * 33], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_row_is_in_one_tile_of_its_expert(rows: list[int]) -> None:
    """Also past 128 tiles of an expert, for no rows at all, and with rows that belong to nobody behind the last."""
    offsets = [0, *torch.tensor(rows).cumsum(0).tolist()]
    want = [
        [e, first, min(first + 2, end)]
        for e, (start, end) in enumerate(pairwise(offsets))
        for first in range(start, end, 2)
    ]
    assert scheduled(offsets, offsets[-1] + 3, 2) == want


@triton.jit
def _walk_kernel(p_out, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    row_tile, col_tile = side_by_side(tl.program_id(0), n_row_tiles, n_col_tiles, GROUP)
    tl.store(p_out + tl.program_id(0) * 2, row_tile)
    tl.store(p_out + tl.program_id(0) * 2 + 1, col_tile)


@pytest.mark.parametrize(("n_rows", "n_cols"), [(3, 2), (1, 5), (8, 1), (5, 3)])
def test_side_by_side_covers_every_tile(n_rows: int, n_cols: int) -> None:
    """A walk over all of them; for 3 x 2 that of the docstring."""
    out = torch.empty(n_rows * n_cols, 2, dtype=torch.int32)
    _walk_kernel[(n_rows * n_cols,)](out, n_rows, n_cols, GROUP=2)
    walk = [tuple(tile) for tile in out.tolist()]
    assert sorted(walk) == [(row, col) for row in range(n_rows) for col in range(n_cols)]
    if (n_rows, n_cols) == (3, 2):
        assert walk == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
