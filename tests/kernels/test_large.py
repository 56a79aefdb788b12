"""Tensors of more than 2^31 elements: element offsets that are worked out in 32 bits land somewhere else."""

import pytest
import torch
from torch import Tensor

from moe_kernels import grouped_gemm
from moe_kernels.combine import sum_slots

PAST_INT32 = 2**31
NEEDED_BYTES = 40 * 2**30

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _room() -> None:
    """A device with little memory cannot ask the question."""
    free = torch.cuda.mem_get_info()[0]
    if free < NEEDED_BYTES:
        pytest.skip(f"runs on a GPU with {NEEDED_BYTES >> 30} GiB of free memory, {free >> 30} GiB are there")


def close(want: Tensor, got: Tensor) -> None:
    """Norm of the difference over the norm; both may be large, so in pieces of rows."""
    assert float((want.float() - got.float()).norm() / want.float().norm()) < 1e-2


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1_100_000, 2048, 64), (1_100_000, 64, 2048)], ids=["x", "y"])
def test_grouped_gemm(rows: int, inputs: int, outputs: int) -> None:
    """y and both gradients where x or y is past 2^31 elements: the first and last rows of every expert."""
    assert rows * max(inputs, outputs) > PAST_INT32
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16).requires_grad_()
    w = (torch.randn(3, outputs, inputs, device="cuda") / inputs**0.5).bfloat16().requires_grad_()
    bounds = [0, rows // 3 + 5, rows // 3 + 5, rows]  # the second expert has no rows
    y = grouped_gemm(x, w, torch.tensor(bounds, dtype=torch.int32, device="cuda"), backend="triton")
    dy = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    with torch.no_grad():
        for expert in (0, 2):
            first, last = bounds[expert], bounds[expert + 1]
            for part in (slice(first, first + 300), slice(last - 300, last)):
                close(x[part].float() @ w[expert].float().t(), y[part])
                close(dy[part].float() @ w[expert].float(), dx[part])
            wanted = torch.zeros(outputs, inputs, device="cuda")
            for start in range(first, last, 100_000):
                part = slice(start, min(start + 100_000, last))
                wanted += dy[part].float().t() @ x[part].float()
            close(wanted, dw[expert])
        assert not dw[1].any()


def test_sum_slots() -> None:
    """Rows past 2^31 elements are gathered from where they are."""
    tokens, top_k, width = 140_000, 8, 2048
    assert tokens * top_k * width > PAST_INT32
    rows = torch.randn(tokens * top_k, width, device="cuda", dtype=torch.bfloat16)
    place = torch.randperm(tokens * top_k, device="cuda").int()
    total = sum_slots(rows, place, top_k, "triton")
    for part in (slice(0, 300), slice(tokens - 300, tokens)):
        wanted = rows[place.view(tokens, top_k)[part].long()].float().sum(1)
        close(wanted, total[part])


def test_sum_slots_past_int32_tokens() -> None:
    """So are results written."""
    tokens, width = 1_100_000, 2048
    assert tokens * width > PAST_INT32
    rows = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    place = torch.arange(tokens - 1, -1, -1, device="cuda", dtype=torch.int32)
    total = sum_slots(rows, place, 1, "triton")
    torch.testing.assert_close(total[-300:], rows[:300].flip(0))
    torch.testing.assert_close(total[:300], rows[-300:].flip(0))
