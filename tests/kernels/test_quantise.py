"""Quantisation to E4M3: scales to the bit, errors within half a step, and Triton the same bits as torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels.fp8_gemm import swiglu_quantised
from moe_kernels.quantise import TILE, quantise_columns, quantise_rows, quantise_weight
from moe_kernels.tiles import TileSchedule, schedule_tiles, schedule_tiles_torch

pytestmark = pytest.mark.usefixtures("device_with_fp8")

OFFSETS = [0, 130, 130, 131, 387]  # two tiles, none, one of a row, two whole ones


def values(*shape: int, place: Any) -> Tensor:
    """Of magnitudes that differ from tile to tile by a factor of a million, with zeros."""
    x = torch.randn(shape) * torch.rand(*shape[:-1], 1).mul(14).sub(7).exp()
    x[..., ::7] = 0
    return x.to(place.dtype).to(place.device)


def tiles_of(offsets: list[int], n_rows: int, place: Any) -> TileSchedule:
    """The schedule, by the backend."""
    run = schedule_tiles if place.backend == "triton" else schedule_tiles_torch
    return run(torch.tensor(offsets, dtype=torch.int32, device=place.device), n_rows, TILE)


def check_tile(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """The scale is the largest over 448, and each value within a sixteenth of itself or half of the last bit."""
    x, q = x.cpu().float(), q.cpu().float()
    assert scale == x.abs().max() / 448
    error = (x.double() - q.double() * scale.double().item()).abs()
    bound = torch.maximum(x.double().abs() / 16, scale.double().cpu() * 2.0**-10)
    assert bool((error <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("width", [1, 128, 300])
@pytest.mark.usefixtures("poisoned_memory")
def test_rows(place: Any, width: int) -> None:
    """Tiles of 1 x 128, the last one not whole; what fills it up is zero."""
    x = values(37, width, place=place)
    x[:, 0] = 1
    q, scales = quantise_rows(x, place.backend)
    assert q.shape == (37, -(-width // TILE) * TILE)
    assert not q[:, width:].float().any()
    for row in (0, 31, 36):
        for block, start in enumerate(range(0, width, TILE)):
            part = slice(start, start + TILE)
            check_tile(x[row, part], q[row, part][: width - start], scales[row, block])


@pytest.mark.parametrize(("n_out", "n_in"), [(128, 256), (130, 100)])
@pytest.mark.usefixtures("poisoned_memory")
def test_weight(place: Any, n_out: int, n_in: int) -> None:
    """Blocks of 128 x 128; transposed the very same values and scales lie the other way round."""
    w = values(3, n_out, n_in, place=place)
    q, scales = quantise_weight(w, False, place.backend)
    for e in range(3):
        for i, row in enumerate(range(0, n_out, TILE)):
            for j, col in enumerate(range(0, n_in, TILE)):
                block = (e, slice(row, row + TILE), slice(col, min(col + TILE, n_in)))
                check_tile(w[block], q[block], scales[e, i, j])
    turned, turned_scales = quantise_weight(w, True, place.backend)
    assert torch.equal(turned[..., :n_out].float(), q[..., :n_in].float().transpose(1, 2))
    assert torch.equal(turned_scales, scales.transpose(1, 2))
    assert not turned[..., n_out:].float().any()


@pytest.mark.parametrize("top_k", [None, 2], ids=["rows", "gathered"])
@pytest.mark.usefixtures("poisoned_memory")
def test_columns(place: Any, top_k: int | None) -> None:
    """Tiles of 128 x 1 that start anew with each expert, transposed, zero behind its last row; rows of null experts,
    here the last five, are in none."""
    n_rows, width = OFFSETS[-1] + 5, 70
    x = values(n_rows // (top_k or 1), width, place=place)
    order = None if top_k is None else torch.randperm(len(x) * top_k, dtype=torch.int32).to(place.device)
    rows = x if order is None else x[order.long() // (top_k or 1)]
    tiles = tiles_of(OFFSETS, n_rows, place)
    q, scales = quantise_columns(x, tiles, place.backend, order, top_k or 1)
    assert int(tiles.count_1) == 5
    for n, (_, first, last) in enumerate(tiles.tiles_N3[:5].tolist()):
        tile = q[:, n * TILE : (n + 1) * TILE].float()
        assert not tile[:, last - first :].any()
        for column in (1, 65, 69):
            check_tile(rows[first:last, column], tile[column, : last - first], scales[n, column])


def test_zero_and_the_smallest_values(place: Any) -> None:
    """A tile of zeros stays zero; gradients far below one keep all their bits, unlike with a least maximum of 1e-4."""
    x = torch.zeros(3, 128, device=place.device)
    x[1] = torch.linspace(-1, 1, 128)
    x[2] = x[1] * 2.0**-20
    q, scales = quantise_rows(x, place.backend)
    assert not q[0].float().any()
    assert scales[0] > 0
    assert torch.equal(q[1].float(), q[2].float())
    assert scales[2] == scales[1] * 2.0**-20


@pytest.mark.interpreter
def test_triton_gives_the_bits_of_torch() -> None:
    """All three, over values on and beside the ties between two numbers of E4M3 and down to its subnormals."""
    x = torch.cat([torch.linspace(-448, 448, 3585)[1:], torch.logspace(-6, 2.6, 3416)]).view(7, 1000)
    x[:, :: TILE // 2] = 448
    tiles = schedule_tiles(torch.tensor([0, 3, 7], dtype=torch.int32), 7, TILE)
    for run in (
        lambda backend: quantise_rows(x, backend),
        lambda backend: quantise_weight(x.view(7, 25, 40), True, backend),
        lambda backend: quantise_columns(x, tiles, backend),
    ):
        (q, scales), (mine, my_scales) = run("torch"), run("triton")
        assert torch.equal(scales[:2], my_scales[:2])
        assert torch.equal(q[:, :256].view(torch.uint8), mine[:, :256].view(torch.uint8))
    exact = torch.arange(-448, 449, 32.0).repeat_interleave(3)[:64]
    assert torch.equal(quantise_rows(exact[None], "triton").values[0, :64].float(), exact)


@pytest.mark.interpreter
def test_ties_of_a_tile_whose_scale_is_no_power_of_two() -> None:
    """448 over 49 must be rounded once, as Triton does: twice rounded, values beside ties fall on the other side."""
    x = torch.tensor([[49.0, *((n + 0.5) * 16 * 49 / 448 for n in range(8, 15))]])
    want, got = (quantise_rows(x, backend).values.float()[0, :8].tolist() for backend in ("torch", "triton"))
    assert want == got


@pytest.mark.usefixtures("poisoned_memory")
def test_activated_rows_are_filled_up_with_zeros(place: Any) -> None:
    """A product multiplies what fills the last tile. Read here, for Triton's interpreter takes 8-bit NaN for 480."""
    h, weight = torch.randn(37, 144).to(place.dtype).to(place.device), torch.rand(37, device=place.device)
    order = torch.arange(37, dtype=torch.int32, device=place.device)
    end = torch.tensor([37], dtype=torch.int32, device=place.device)
    q, _ = swiglu_quantised(h, order, weight, end, place.backend)
    assert not q[:, 72:].float().any()


@pytest.mark.interpreter
def test_schedule_in_torch_is_that_of_triton() -> None:
    """The same tiles in the same order, and none of the rest has rows."""
    offsets = torch.tensor(OFFSETS, dtype=torch.int32)
    for n_rows in (OFFSETS[-1], OFFSETS[-1] + 300):
        mine, reference = (run(offsets, n_rows, TILE) for run in (schedule_tiles, schedule_tiles_torch))
        count = int(reference.count_1)
        assert len(mine.tiles_N3) == len(reference.tiles_N3)
        assert torch.equal(mine.count_1, reference.count_1)
        assert torch.equal(mine.tiles_N3[:count], reference.tiles_N3[:count])
        assert not reference.tiles_N3[count:].any()
