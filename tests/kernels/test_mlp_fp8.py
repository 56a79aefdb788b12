"""expert_mlp(fp8=True) against fp64: on the operands as quantised, and on those before, value and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from moe_kernels import KernelError, expert_mlp

pytestmark = pytest.mark.usefixtures("device_with_fp8")

# tokens, model, hidden, experts, top-k
CASES = {
    "one-token": (1, 24, 20, 4, 2),
    "one-expert": (7, 33, 5, 1, 1),
    "odd": (63, 133, 5, 6, 3),
    "whole-tiles": (40, 256, 128, 3, 2),
    "several-tiles": (150, 140, 136, 2, 2),
    "more-experts-than-rows": (2, 16, 8, 33, 2),
}
NAMES = ("y", "dx", "dgate_up", "ddown", "dweight")

# Of the largest value. fp32: a value of E4M3 may fall on the other side of a tie, an eighth of one operand among many.
# In 16 bits what lies between the products is rounded to them, and many do.
AS_QUANTISED = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# The norm of the difference over the norm: an operand is off by 2.7 % (root mean square), and each result has gone
# through two to four of them. A scale left out is off by a factor.
BEFORE = (0.01, 0.12)


def stands_for(x: Tensor, height: int, width: int) -> Tensor:
    """fp64 numbers that a matrix stands for once quantised in tiles of height x width."""
    found = torch.empty_like(x)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            tile = x[i : i + height, j : j + width].float()
            largest = tile.abs().max().clamp(min=1e-30)
            q = (tile * (torch.tensor(448.0) / largest)).to(torch.float8_e4m3fn)  # 448 / tensor would round twice
            found[i : i + height, j : j + width] = q.double() * (largest / 448).double()
    return found


def by_hand(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, dy: Tensor, *, quantised: bool
) -> tuple[Tensor, ...]:
    """y and the gradients of x, both weights and the routing weights, expert by expert in fp64."""

    def q(t: Tensor, height: int, width: int) -> Tensor:
        return stands_for(t, height, width) if quantised else t

    y, dx, dweight = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weight)
    d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for e in range(len(down)):
        token, slot = (index == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        w1, w2, w = q(gate_up[e], 128, 128), q(down[e], 128, 128), weight[token, slot].unsqueeze(1)
        h = q(x, 1, 128)[token] @ w1.t()
        gate, up = h.chunk(2, 1)
        wa = w * silu(gate) * up
        y.index_add_(0, token, q(wa, 1, 128) @ w2.t())
        g = q(dy, 1, 128)[token] @ w2
        dweight[token, slot] = (g * silu(gate) * up).sum(1)
        s = gate.sigmoid()
        dh = torch.cat([w * g * up * s * (1 + gate * (1 - s)), w * g * silu(gate)], 1)
        d_down[e] = q(dy[token], 128, 1).t() @ q(wa, 128, 1)
        d_gate_up[e] = q(dh, 128, 1).t() @ q(x[token], 128, 1)
        dx.index_add_(0, token, q(dh, 1, 128) @ w1)
    return y, dx, d_gate_up, d_down, dweight


def problem(place: Any, index: Tensor, width: int, hidden: int, n_experts: int) -> tuple[list[Tensor], Tensor]:
    """Leaves x, gate_up, down and weight, and dy; rows of x and of dy have magnitudes of their own."""
    x = torch.randn(len(index), width) * torch.rand(len(index), 1).mul(3).exp() / 4
    gate_up = torch.randn(n_experts, 2 * hidden, width) / width**0.5
    down = torch.randn(n_experts, width, hidden) / hidden**0.5 * 30
    leaves = [t.to(place.dtype).to(place.device).requires_grad_() for t in (x, gate_up, down)]
    weight = (torch.rand(index.shape) + 0.5).to(place.device).requires_grad_()
    dy = torch.randn(len(index), width) * torch.rand(len(index), 1).mul(3).exp() / 1000
    return [*leaves, weight], dy.to(place.dtype).to(place.device)


def run(place: Any, leaves: list[Tensor], index: Tensor, dy: Tensor, null_experts: int = 0) -> tuple[Tensor, ...]:
    """y and gradients by the library op, which takes any dtype."""
    x, gate_up, down, weight = leaves
    given = (x, gate_up, down, index.to(place.device), weight, None, null_experts, "after")
    y, *_ = torch.ops.moe_kernels.expert_mlp(*given, True, True, place.backend)
    return y, *torch.autograd.grad(y, leaves, dy)


def check(place: Any, index: Tensor, width: int, hidden: int, n_experts: int, null_experts: int = 0) -> None:
    """One problem both ways."""
    leaves, dy = problem(place, index, width, hidden, n_experts)
    found = run(place, leaves, index, dy, null_experts)
    exact = [t.detach().cpu().double() for t in leaves]
    given = (*exact[:3], index, exact[3], dy.cpu().double())
    for name, want, got in zip(NAMES, by_hand(*given, quantised=True), found, strict=True):
        assert torch.isfinite(got).all(), name
        place.agree(name, want, got, AS_QUANTISED[place.dtype])
    for name, want, got in zip(NAMES, by_hand(*given, quantised=False), found, strict=True):
        error = float((want - got.detach().cpu().double()).norm() / want.norm().clamp(min=1e-30))
        assert error <= BEFORE[1], f"{name} is off by {error:.1e} of the unquantised result"
        if want.norm() and want.numel() > 1000:
            assert error >= BEFORE[0], f"{name} was not quantised: off by {error:.1e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_fp64(place: Any, case: str) -> None:
    """Whatever the sizes: the last tile of rows, columns and the sum need not be whole; experts may have no rows."""
    n_tokens, width, hidden, n_experts, top_k = CASES[case]
    check(place, torch.rand(n_tokens, n_experts).argsort(-1)[:, :top_k], width, hidden, n_experts)


@pytest.mark.usefixtures("poisoned_memory")
def test_all_tokens_on_one_expert(place: Any) -> None:
    """More than two tiles of rows of one, none of the others, whose gradients are zero."""
    check(place, torch.full((260, 1), 2), 16, 8, 4)


@pytest.mark.parametrize("index", [[[0, 3], [4, 1], [3, 4], [2, 0], [0, 1]], [[3, 4], [4, 3]]], ids=["some", "all"])
@pytest.mark.usefixtures("poisoned_memory")
def test_null_experts_add_nothing(place: Any, index: list[list[int]]) -> None:
    """Choices from 3 on are of no expert, and nobody writes their rows."""
    check(place, torch.tensor(index), 33, 8, 3, null_experts=2)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_of_older_devices(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capability 8.9 has no TMA: both operands come through pointers, in smaller tiles."""
    monkeypatch.setattr("moe_kernels.fp8_gemm.capability_of", lambda device: (8, 9))
    check(place, torch.rand(150, 4).argsort(-1)[:, :2], 140, 72, 3, null_experts=1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", range(5), ids=["x", "gate_up", "down", "weight", "dy"])
def test_what_is_not_finite_is_not_hidden(place: Any, where: int, value: float) -> None:
    """The trainer sees a broken step by its loss or its gradients' norm: no maximum leaves NaN out."""
    index = torch.rand(12, 3).argsort(-1)[:, :2]
    leaves, dy = problem(place, index, 40, 24, 3)
    given = [*(t.detach().clone() for t in leaves), dy]
    given[where].view(-1)[0] = value
    y, *gradients = run(place, [t.requires_grad_() for t in given[:4]], index, given[4])
    seen = [y] if where < 4 else gradients
    assert all(not t.isfinite().all() for t in seen)


def test_no_tokens(place: Any) -> None:
    """A rank that received nothing still gives every parameter a gradient."""
    leaves, dy = problem(place, torch.empty(0, 2, dtype=torch.int64), 16, 8, 3)
    y, dx, d_gate_up, d_down, _ = run(place, leaves, torch.empty(0, 2, dtype=torch.int64), dy)
    assert y.shape == dx.shape == (0, 16)
    assert not d_gate_up.any()
    assert not d_down.any()


def test_equal_inputs_give_equal_bits_and_small_gradients_are_kept(place: Any) -> None:
    """A gradient 2**-10 as large gives results exactly so much smaller: every scale follows its tile."""
    index = torch.rand(50, 4).argsort(-1)[:, :3]
    leaves, dy = problem(place, index, 136, 72, 4)
    dy = torch.full_like(dy, 0.5) if place.dtype == torch.float16 else dy  # whose own range ends near
    first, again, small = (run(place, leaves, index, t) for t in (dy, dy, dy * 2.0**-10))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if place.dtype != torch.float16:
        assert all(torch.equal(a * 2.0**-10, b) for a, b in zip(first[1:], small[1:], strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_keeps_fp32_masters(device: str) -> None:
    """The public function computes in bf16 around its products, gradients are fp32; x, h and index arrays are kept."""
    n_tokens, width, hidden, n_experts, top_k = 256, 64, 32, 4, 2
    x = torch.randn(n_tokens, width, device=device, requires_grad=True)
    gate_up = torch.randn(n_experts, 2 * hidden, width, device=device, requires_grad=True)
    down = torch.randn(n_experts, width, hidden, device=device, requires_grad=True)
    index = torch.rand(n_tokens, n_experts, device=device).argsort(-1)[:, :top_k]
    weight = torch.rand(n_tokens, top_k, device=device, requires_grad=True)
    parameters, kept = {gate_up.data_ptr(), down.data_ptr()}, {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(device, torch.bfloat16):
        y = expert_mlp(x, gate_up, down, index, weight, fp8=True)
        plain = expert_mlp(x.detach(), gate_up.detach(), down.detach(), index, weight.detach())
    assert y.dtype == torch.bfloat16
    assert 0.01 < float((y.detach() - plain).float().norm() / plain.float().norm()) < BEFORE[1]
    smallest = 2 * (n_tokens * width + n_tokens * top_k * 2 * hidden)
    assert smallest <= sum(kept.values()) <= 1.2 * smallest
    y.float().square().sum().backward()
    assert {t.grad.dtype for t in (x, gate_up, down, weight)} == {torch.float32}


def small(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """x, gate_up, down, index, weight."""
    x, gate_up, down = torch.randn(5, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    index, weight = torch.rand(5, 3).argsort(-1)[:, :2], torch.rand(5, 2, requires_grad=True)
    return *(t.to(dtype).requires_grad_() for t in (x, gate_up, down)), index, weight


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence: dtypes other than bf16, other places of the weight, devices without fp8."""
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(KernelError, match=f"not {dtype}: run under torch.autocast"):
            expert_mlp(*small(dtype), fp8=True)
    with pytest.raises(KernelError, match="weighting='after' only, not 'before'"):
        expert_mlp(*small(), fp8=True, weighting="before")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("moe_kernels.configs.capability_of", lambda device: (8, 0))
    with pytest.raises(KernelError, match=r"needs compute capability 8.9 or newer, and cpu has 8.0: use fp8=False"):
        expert_mlp(*small(), fp8=True)


def test_library_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree; without keep there is no gradient, and no h."""
    op = torch.ops.moe_kernels.expert_mlp.default
    torch.library.opcheck(op, (*small(torch.float32), None, 0, "after", True, True, "torch"))
    given = (*small(), None, 0, "after", True, False, "torch")
    with pytest.raises(KernelError, match="keep=False, and has no gradient"):
        op(*given)
    with torch.no_grad():
        assert op(*given)[1].numel() == 0


def test_compiles_as_one_graph() -> None:
    """torch.compile(fullgraph=True), forward and backward."""
    given = small(torch.float32)
    leaves = [t for t in given if t.requires_grad]

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return expert_mlp(x, gate_up, down, index, weight, fp8=True).float().square().sum()

    want = torch.autograd.grad(layer(*given), leaves)
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(*given), leaves)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
