"""The torch backend's activation, and the sum over a token's rows, on the numbers of their docstrings."""

from typing import Any

import pytest
import torch

from moe_kernels.combine import sum_slots
from moe_kernels.swiglu import swiglu_backward, swiglu_forward


def test_swiglu_worked_example() -> None:
    """Gate zero: nothing passes, and only the gate gets a gradient."""
    h, q, w = torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0]]), torch.tensor([0.5])
    assert swiglu_forward(h, w).tolist() == [[0]]
    dh, wa, dw = swiglu_backward(q, h, w)
    assert (dh.tolist(), wa.tolist(), dw.tolist()) == ([[1.5, 0]], [[0]], [0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n_rows", "hidden"), [(1, 3), (5, 300), (2500, 2)])
@pytest.mark.usefixtures("poisoned_memory")
def test_swiglu_matches_autograd(on_cpu: Any, n_rows: int, hidden: int, dtype: torch.dtype, tolerance: float) -> None:
    """Value and gradients in fp64, over more than one block of rows and of columns."""
    h = torch.randn(n_rows, 2 * hidden).to(dtype)
    q, w = torch.randn(n_rows, hidden).to(dtype), torch.rand(n_rows) + 0.5
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    gate, up = h64.chunk(2, -1)
    want = w64[:, None] * torch.nn.functional.silu(gate) * up
    want.backward(q.double())
    on_cpu.agree("wa", want, swiglu_forward(h, w), tolerance)
    dh, wa, dw = swiglu_backward(q, h, w)
    on_cpu.agree("dh", h64.grad, dh, tolerance)
    on_cpu.agree("wa in the backward", want, wa, tolerance)
    on_cpu.agree("dw", w64.grad, dw, tolerance)


def test_combine_worked_example(place: Any) -> None:
    """Each token adds its two rows, wherever sorting put them."""
    rows = torch.tensor([[10.0], [20], [30], [40]], dtype=place.dtype, device=place.device)
    slots = torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=place.device)
    assert sum_slots(rows, slots, 2, place.backend).tolist() == [[40], [60]]


def test_combine_skips_rows_of_null_experts(place: Any) -> None:
    """They hold anything, NaN for example."""
    rows = torch.tensor([[10.0], [20], [torch.nan], [torch.nan]], dtype=place.dtype, device=place.device)
    slots = torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=place.device)
    end = torch.tensor([2], dtype=torch.int32, device=place.device)
    assert sum_slots(rows, slots, 2, place.backend, end).tolist() == [[10], [20]]


@pytest.mark.usefixtures("poisoned_memory")
def test_combine_adds_in_fp32(place: Any) -> None:
    """Many slots of one sign: sums kept in 16 bits would stall. Odd width, more tokens than a block."""
    rows = (torch.rand(11 * 32, 37) + 1).to(place.dtype)
    slots = torch.randperm(11 * 32, dtype=torch.int32)
    want = rows.double()[slots]
    got = sum_slots(rows.to(place.device), slots.to(place.device), 32, place.backend)
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[place.dtype]
    place.agree("total", want.view(11, 32, 37).sum(1), got, rounding)
