"""Batches of experts of like load: where rows lie, in how few shapes they are multiplied, and that nothing leaks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import expert_mlp, mlp_batches, mlp_torch
from moe_kernels.batches import Batches
from moe_kernels.dispatch import sort_rows


def offsets_of(rows: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)


class Products(TorchDispatchMode):
    """Remembers the shapes of batched products while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.products = self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.bmm.out):
            self.shapes.add(tuple(args[0].shape))
            self.products += 1
            self.rows += args[0].shape[0] * args[0].shape[1]
        assert func not in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
        return func(*args, **(kwargs or {}))


def test_worked_example() -> None:
    """The numbers of the file's docstring, and rows behind the last group."""
    lie = Batches(offsets_of([33, 30, 0, 2]), 67)
    assert [(piece.slots, piece.rows) for piece in lie.pieces] == [(slice(0, 128), slice(0, 65))]
    assert lie.n_slots == 1024
    slots = [*range(64, 97), *range(30), 32, 33, 1023, 1023]
    assert lie.slots_of(torch.arange(67)).tolist() == slots
    assert lie.real.nonzero().squeeze(1).tolist() == lie.real_slots.tolist() == sorted(slots[:65])
    found = lie.spread(torch.arange(67))
    assert found[slots[:65]].tolist() == list(range(65))
    assert found[97:128].tolist() == [32] * 31  # the last of 0 .. 32
    assert found[34:64].tolist() == [64] * 30
    assert lie.gather(found)[:65].tolist() == list(range(65))
    assert lie.clear(torch.ones(1024)).nonzero().squeeze(1).tolist() == list(range(1023))


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_few_shapes_and_few_surplus_rows(sigma: float) -> None:
    """oneDNN takes 2 ms and 0.7 MB for every shape of every product; fifty steps of 64 experts have some sixty, and
    each step's products at most half as many rows again."""
    seen = Products()
    for _ in range(50):
        share = (sigma * torch.randn(64)).exp()
        rows = torch.bincount(torch.multinomial(share, 12288, replacement=True), minlength=64).tolist()
        lie = Batches(offsets_of(rows), 12288)
        x, y = lie.spread(torch.zeros(12288, 8, dtype=torch.bfloat16)), torch.zeros(lie.n_slots, 8).bfloat16()
        before = seen.rows
        with seen:
            for piece in lie.pieces:
                piece.product(x[piece.slots], torch.zeros(64, 8, 8), y[piece.slots])
        assert 12288 <= seen.rows - before <= 1.5 * 12288
        assert seen.products <= 20
        seen.products = 0
        assert len(lie.pieces) <= 10
    assert len(seen.shapes) <= 60


@pytest.mark.parametrize(
    "rows",
    [
        [0, 5, 0, 40, 33, 31, 2, 0],
        [0] * 8,
        [111] + [0] * 7,
        [0, 900, 33, 2100, 60, 64, 62, 61],  # several pieces
        [40, 50, 33, 64, 60, 61, 45, 39],  # eight in one product
    ],
)
@pytest.mark.parametrize("weighting", ["after", "before", "none"])
@pytest.mark.usefixtures("poisoned_memory")
def test_same_as_rows_in_groups(rows: list[int], weighting: str) -> None:
    """Both ways give the same, but for the rounding of sums in another order; rows of no expert come last. What each
    keeps in between is its own."""
    index = torch.arange(8).repeat_interleave(torch.tensor(rows))
    n_rows = sum(rows) // 2 * 2 + 190
    index = torch.cat([index, torch.full((n_rows - len(index),), 8)])[torch.randperm(n_rows)].view(-1, 2)
    order, place, offsets = sort_rows(index, 9, None, "torch")
    given = [order, place, offsets[:9]]
    x, dy = torch.randn(len(index), 40).bfloat16(), torch.randn(len(index), 40).bfloat16()
    gate_up, down, weight = torch.randn(8, 48, 40) / 6, torch.randn(8, 40, 24) / 5, torch.rand(len(index), 2)
    found = []
    for way in (mlp_torch, mlp_batches):
        y, h = way.forward(x, gate_up, down, weight, *given, 1, weighting, True)
        grads = way.backward(dy, x, gate_up, down, weight, h, *given, [True] * 4, 1, weighting)
        found.append((y, *grads))
        assert h.shape == (n_rows, 48)
        assert way is mlp_torch or not h[sum(rows) :].any()
        alone, none = way.forward(x, gate_up, down, weight, *given, 1, weighting, False)
        assert torch.equal(alone, y)
        assert not none.numel()
    for want, got in zip(*found, strict=True):
        assert want.dtype == got.dtype
        assert (want.float() - got.float()).abs().max() <= 2e-2 * want.float().abs().max()
    for expert, n in enumerate(rows):
        assert n or not found[1][2][expert].any()


@pytest.mark.parametrize("needed", range(3), ids=["x", "gate_up", "down"])
def test_only_what_is_needed(needed: int) -> None:
    """One gradient alone is the same as among all; the others come back empty."""
    index = torch.arange(256).remainder(4).view(128, 2)
    given = sort_rows(index, 4, None, "torch")
    x, dy = torch.randn(128, 16).bfloat16(), torch.randn(128, 16).bfloat16()
    gate_up, down, weight = torch.randn(4, 16, 16), torch.randn(4, 16, 8), torch.rand(128, 2)
    _, h = mlp_batches.forward(x, gate_up, down, weight, *given, 0, "after", True)

    def grads(need: list[bool]) -> tuple[Tensor, ...]:
        return mlp_batches.backward(dy, x, gate_up, down, weight, h, *given, need, 0, "after")

    every, some = grads([True] * 4), grads([i == needed for i in range(4)])
    for i in range(3):
        assert torch.equal(every[i], some[i]) if i == needed else not some[i].numel()


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
    assert Batches.fit(x.bfloat16(), offsets, 64)
    assert not Batches.fit(x.bfloat16(), offsets, 63)
    for other in (x, x.half()):
        assert not Batches.fit(other, offsets, 64)


def test_library_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree."""
    x, weight = torch.randn(64, 8).bfloat16().requires_grad_(), torch.rand(64, 2, requires_grad=True)
    gate_up, down = torch.randn(3, 12, 8, requires_grad=True), torch.randn(3, 8, 6, requires_grad=True)
    index = torch.rand(64, 4).argsort(-1)[:, :2]
    given = (x, gate_up, down, index, weight, None, 1, "after", False, True, "torch")
    torch.library.opcheck(torch.ops.moe_kernels.expert_mlp.default, given)
