"""Batches of experts of like load: where rows lie, in how few shapes they are multiplied, and that nothing leaks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import expert_mlp, mlp_torch
from moe_kernels.batches import Batches
from moe_kernels.dispatch import sort_rows
from moe_kernels.gemm_torch import Groups, layout_of


def offsets_of(rows: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)


class Products(TorchDispatchMode):
    """Remembers the shapes of batched products while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.bmm.out):
            self.shapes.add(tuple(args[0].shape))
            self.rows += args[0].shape[0] * args[0].shape[1]
        assert func not in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return func(*args, **(kwargs or {}))


def test_worked_example() -> None:
    """The numbers of the file's docstring, and rows behind the last group."""
    lie = Batches(offsets_of([33, 30, 0, 2]), 67)
    slots = [*range(64, 97), *range(30), 32, 33, 128, 128]
    assert lie.slots(torch.arange(67)).tolist() == slots
    found = lie.spread(torch.arange(67))
    assert found[slots[:65]].tolist() == list(range(65))
    assert found[30:32].tolist() == [62, 62]  # the last of 33 .. 62
    assert found[34:64].tolist() == [64] * 30
    assert lie.gather(found)[:65].tolist() == list(range(65))
    blank = lie.blank(torch.ones(129))
    assert blank.nonzero().squeeze(1).tolist() == sorted(slots[:65])


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_few_shapes_and_few_surplus_rows(sigma: float) -> None:
    """oneDNN keeps some thousand compiled shapes; fifty steps of 64 experts use a fifth of that, each step's products
    at most a tenth more rows than whole steps of 32."""
    seen = Products()
    for _ in range(50):
        share = (sigma * torch.randn(64)).exp()
        rows = torch.bincount(torch.multinomial(share, 12288, replacement=True), minlength=64).tolist()
        lie = Batches(offsets_of(rows), 12288)
        x = lie.spread(torch.zeros(12288, 8, dtype=torch.bfloat16))
        before = seen.rows
        with seen:
            lie.product(x, torch.zeros(64, 8, 8))
        assert 12288 <= seen.rows - before <= 1.1 * sum(-(-n // 32) * 32 for n in rows)
    assert len(seen.shapes) <= 200


@pytest.mark.parametrize("rows", [[0, 5, 0, 40, 33, 31, 2, 0], [0] * 8, [111] + [0] * 7])
@pytest.mark.parametrize("weighting", ["after", "before", "none"])
@pytest.mark.usefixtures("poisoned_memory")
def test_same_as_rows_in_groups(rows: list[int], weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layouts give the same, but for the rounding of sums in another order; rows of no expert come last."""
    index = torch.arange(8).repeat_interleave(torch.tensor(rows))
    index = torch.cat([index, torch.full((300 - len(index),), 8)])[torch.randperm(300)].view(150, 2)
    order, place, offsets = sort_rows(index, 9, None, "torch")
    given = [order, place, offsets[:9]]
    x, dy = torch.randn(150, 40).bfloat16(), torch.randn(150, 40).bfloat16()
    gate_up, down, weight = torch.randn(8, 48, 40) / 6, torch.randn(8, 40, 24) / 5, torch.rand(150, 2)
    found = []
    for layout in (Groups(given[2], True), Batches(given[2], 300)):
        monkeypatch.setattr(mlp_torch, "layout_of", lambda *args, layout=layout: layout)
        y, h = mlp_torch.forward(x, gate_up, down, weight, *given, 1, weighting, True)
        grads = mlp_torch.backward(dy, x, gate_up, down, weight, h, *given, [True] * 4, 1, weighting)
        found.append((y, h, *grads))
    for want, got in zip(*found, strict=True):
        assert want.dtype == got.dtype
        assert (want.float() - got.float()).abs().max() <= 2e-2 * want.float().abs().max()
    for expert, n in enumerate(rows):
        assert n or not found[1][3][expert].any()


@pytest.mark.parametrize("token", [0, 136], ids=["first of its expert", "last, and repeated"])
def test_a_token_that_is_not_finite_spoils_its_expert_only(token: int) -> None:
    """What fills an expert up is its own: NaN in one token reaches no other token, expert or weight."""
    x = torch.randn(140, 16)
    x[token] = torch.nan
    x.requires_grad_()
    gate_up, down = (torch.randn(4, *shape, requires_grad=True) for shape in ((16, 16), (16, 8)))
    index = (torch.arange(140) % 4 + 1).unsqueeze(1)  # both go to expert 1; expert 0 has no token, and 4 is a null one
    weight = torch.ones(140, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_mlp(x, gate_up, down, index, weight, null_experts=1)
    y.float().sum().backward()
    for rows in (y, x.grad, weight.grad):
        assert rows.isnan().any(1).nonzero().flatten().tolist() == [token]
    for grads in (gate_up.grad, down.grad):
        assert [bool(grad.isnan().any()) for grad in grads] == [False, True, False, False]


def test_few_rows_are_not_filled_up() -> None:
    """Below a step an expert, as when a model writes, or in other dtypes, rows lie as they are sorted."""
    offsets, x = offsets_of([31, 33]), torch.randn(4, 8)
    assert isinstance(layout_of(x.bfloat16(), offsets, 64, False), Batches)
    assert isinstance(layout_of(x.bfloat16(), offsets, 63, False), Groups)
    for other in (x, x.half()):
        assert isinstance(layout_of(other, offsets, 64, False), Groups)


def test_library_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree."""
    x, weight = torch.randn(64, 8).bfloat16().requires_grad_(), torch.rand(64, 2, requires_grad=True)
    gate_up, down = torch.randn(3, 12, 8, requires_grad=True), torch.randn(3, 8, 6, requires_grad=True)
    index = torch.rand(64, 4).argsort(-1)[:, :2]
    given = (x, gate_up, down, index, weight, None, 1, "after", False, True, "torch")
    torch.library.opcheck(torch.ops.moe_kernels.expert_mlp.default, given)
