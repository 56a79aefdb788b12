"""The parts of the expert MLP between its products, on the numbers of their docstrings."""

from typing import Any

import pytest
import torch

from moe_kernels.combine import sum_slots
from moe_kernels.gemm import grouped_gemm_kernel
from moe_kernels.swiglu import swiglu_backward, swiglu_forward


def test_swiglu_worked_example(place: Any) -> None:
    """Gate zero: nothing passes, and only the gate gets a gradient."""
    h = torch.tensor([[0.0, 3.0]], dtype=place.dtype, device=place.device)
    q, w = torch.tensor([[2.0]], dtype=place.dtype, device=place.device), torch.tensor([0.5], device=place.device)
    assert swiglu_forward(h, w, place.backend).tolist() == [[0]]
    dh, wa, dw = swiglu_backward(q, h, w, place.backend)
    assert (dh.tolist(), wa.tolist(), dw.tolist()) == ([[1.5, 0]], [[0]], [0])


@pytest.mark.parametrize(("n_rows", "hidden"), [(1, 3), (5, 300), (2500, 2)])
@pytest.mark.usefixtures("poisoned_memory")
def test_swiglu_matches_autograd(place: Any, n_rows: int, hidden: int) -> None:
    """Value and gradients in fp64, over more than one block of rows and of columns."""
    h = torch.randn(n_rows, 2 * hidden).to(place.dtype)
    q, w = torch.randn(n_rows, hidden).to(place.dtype), torch.rand(n_rows) + 0.5
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    gate, up = h64.chunk(2, -1)
    want = w64[:, None] * torch.nn.functional.silu(gate) * up
    want.backward(q.double())
    h, q, w = (t.to(place.device) for t in (h, q, w))
    place.agree("wa", want, swiglu_forward(h, w, place.backend))
    dh, wa, dw = swiglu_backward(q, h, w, place.backend)
    place.agree("dh", h64.grad, dh)
    place.agree("wa in the backward", want, wa)
    place.agree("dw", w64.grad, dw)


def test_combine_worked_example(place: Any) -> None:
    """Each token adds its two rows, wherever sorting put them."""
    rows = torch.tensor([[10.0], [20], [30], [40]], dtype=place.dtype, device=place.device)
    slots = torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=place.device)
    assert sum_slots(rows, slots, 2, place.backend).tolist() == [[40], [60]]


@pytest.mark.usefixtures("poisoned_memory")
def test_combine_adds_in_fp32(place: Any) -> None:
    """Many slots of one sign: sums kept in 16 bits would stall. Odd width, more tokens than a block."""
    rows = (torch.rand(11 * 32, 37) + 1).to(place.dtype)
    slots = torch.randperm(11 * 32, dtype=torch.int32)
    want = rows.double()[slots]
    got = sum_slots(rows.to(place.device), slots.to(place.device), 32, place.backend)
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[place.dtype]
    place.agree("total", want.view(11, 32, 37).sum(1), got, rounding)


@pytest.mark.interpreter
def test_tile_schedule_worked_example() -> None:
    """BM = 2 and offsets 0 3 3 4: three tiles of the four launched have work, as the kernel's docstring says."""
    x, w = torch.randn(4, 16), torch.randn(3, 16, 16)
    offsets = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    written = []
    for tile in range(4):
        y = torch.full((4, 16), float("nan"))
        one_tile = y.clone()
        grouped_gemm_kernel[(tile + 1,)](
            x, w, one_tile, offsets, 3, 16, 16, *w.stride(), BE=4, BM=2, BN=16, BK=16, PRECISION="ieee"
        )
        written.append((~one_tile.isnan()).any(1).tolist())
    assert written == [
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
        [True, True, True, True],
    ]
    torch.testing.assert_close(one_tile, torch.cat([x[:3] @ w[0].t(), x[3:] @ w[2].t()]))
