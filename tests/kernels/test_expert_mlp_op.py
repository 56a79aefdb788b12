"""What expert_mlp keeps, launches and refuses, and how it lives with autocast, torch.compile and checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import KernelError, expert_mlp, mlp_torch, mlp_triton, topk_route
from moe_kernels.dispatch import sort_rows


class Calls(TorchDispatchMode):
    """Remembers which torch functions run while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """Remembers the shape of the h that the library op returns."""

    of_h: tuple[int, ...] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.moe_kernels.expert_mlp.default:
            self.of_h = tuple(out[1].shape)
        return out


@pytest.mark.interpreter
def test_triton_permutes_no_rows() -> None:
    """x[token] and dy[token] are never made: the kernels gather them. The torch backend does make them."""
    x, gate_up, down = torch.randn(9, 24), torch.randn(4, 24, 24), torch.randn(4, 24, 12)
    index, weight = torch.rand(9, 4).argsort(-1)[:, :2], torch.rand(9, 2)
    gathers = []
    rows = sort_rows(index, 4, None, "torch")
    for backend in (mlp_triton, mlp_torch):
        with Calls() as calls:
            y, h = backend.forward(x, gate_up, down, weight, *rows, 0, "after", True)
            backend.backward(y, x, gate_up, down, weight, h, *rows, [True] * 4, 0, "after")
        gathers.append(calls.seen & {"index_select", "index", "gather", "take", "embedding"})
    assert gathers == [set(), {"index_select"}]


@pytest.mark.interpreter
def test_triton_clears_no_rows_of_null_experts() -> None:
    """What nobody wrote is skipped where it would be read: no buffer is filled with zeros."""
    x, gate_up, down = torch.randn(9, 24), torch.randn(4, 24, 24), torch.randn(4, 24, 12)
    index, weight = torch.rand(9, 6).argsort(-1)[:, :2], torch.rand(9, 2)
    order, place, offsets = sort_rows(index, 6, None, "torch")
    rows = order, place, offsets[:5]
    with Calls() as calls:
        y, h = mlp_triton.forward(x, gate_up, down, weight, *rows, 2, "after", True)
        mlp_triton.backward(y, x, gate_up, down, weight, h, *rows, [True] * 4, 2, "after")
    assert not {name for name in calls.seen if "zero" in name or "full" in name}


def test_pre_activations_are_kept_for_a_backward_pass_only(place: Any, leaf: Callable[..., Tensor]) -> None:
    """Where no gradient is needed h is not even stored; y is the same to the bit."""
    x, gate_up, down = leaf(5, 16), leaf(3, 16, 16, fan_in=16), leaf(3, 16, 8, fan_in=8)
    index, weight = torch.rand(5, 3).argsort(-1)[:, :2].to(place.device), torch.rand(5, 2, device=place.device)
    op = torch.ops.moe_kernels.expert_mlp.default
    given = (x, gate_up, down, index, weight, None, 0, "after", False)
    y, h, *_ = op(*given, True, place.backend)
    assert h.shape == (10, 16)
    with pytest.raises(KernelError, match="keep=False, and has no gradient"):
        op(*given, False, place.backend)
    with torch.no_grad():
        fewer, none, *_ = op(*given, False, place.backend)
    assert none.numel() == 0
    assert torch.equal(y, fewer)
    for gradients, shape in ((True, (10, 16)), (False, (0,))):
        with torch.set_grad_enabled(gradients), Shapes() as shapes:
            expert_mlp(x, gate_up, down, index, weight, backend=place.backend)
        assert shapes.of_h == shape


@pytest.mark.parametrize("weighting", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_minds_no_autocast(place: Any, dtype: torch.dtype, weighting: Any) -> None:
    """What ran outside a region of autocast has the same gradients when its backward pass is called inside one."""
    x, gate_up, down = torch.randn(40, 14), torch.randn(3, 12, 14), torch.randn(3, 14, 6)
    leaves = [t.to(place.device, dtype).requires_grad_() for t in (x, gate_up, down)]
    index, weight = torch.rand(40, 3).argsort(-1)[:, :2].to(place.device), torch.rand(40, 2, device=place.device)
    y = expert_mlp(*leaves, index, weight.requires_grad_(), weighting=weighting, backend=place.backend)
    want = torch.autograd.grad(y, [*leaves, weight], y.detach(), retain_graph=True)
    for other in (torch.bfloat16, torch.float16):
        with torch.autocast(place.device, other):
            got = torch.autograd.grad(y, [*leaves, weight], y.detach(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_keeps_fp32_masters(device: str) -> None:
    """Under autocast the result is bf16, equal to casting by hand, and gradients are fp32."""
    x = torch.randn(9, 16, device=device, requires_grad=True)
    gate_up = torch.randn(4, 16, 16, device=device, requires_grad=True)
    down = torch.randn(4, 16, 8, device=device, requires_grad=True)
    index = torch.rand(9, 4, device=device).argsort(-1)[:, :2]
    weight = torch.rand(9, 2, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = expert_mlp(x, gate_up, down, index, weight)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {t.grad.dtype for t in (x, gate_up, down, weight)} == {torch.float32}
    by_hand = expert_mlp(*(t.detach().bfloat16() for t in (x, gate_up, down)), index, weight.detach())
    assert torch.equal(y, by_hand)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_keeps_x_and_the_pre_activations_only(backend: str) -> None:
    """Bytes kept for the backward stay within 10 % of x + h, parameters aside; under autocast no cast weight is."""
    n_tokens, width, hidden, n_experts, top_k = 512, 64, 32, 8, 4
    gate_up = torch.randn(n_experts, 2 * hidden, width, requires_grad=True)
    down = torch.randn(n_experts, width, hidden, requires_grad=True)
    index, weight = torch.rand(n_tokens, n_experts).argsort(-1)[:, :top_k], torch.rand(n_tokens, top_k)
    parameters = {gate_up.data_ptr(), down.data_ptr()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    for autocast, size in ((False, 4), (True, 2)):
        kept.clear()
        x = torch.randn(n_tokens, width, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", dtype=torch.float16, enabled=autocast),
        ):
            y = expert_mlp(x, gate_up, down, index, weight, backend=backend)
        smallest = size * (n_tokens * width + n_tokens * top_k * 2 * hidden)
        assert smallest <= sum(kept.values()) <= 1.1 * smallest
        y.sum().backward()


def test_frozen_parts_get_no_gradient(place: Any, leaf: Callable[..., Tensor]) -> None:
    """Only what asks for a gradient gets one, and the rest is still right."""
    x, gate_up, down = leaf(5, 16).detach(), leaf(3, 16, 16, fan_in=16), leaf(3, 16, 8, fan_in=8).detach()
    index, weight = torch.rand(5, 3).argsort(-1)[:, :2].to(place.device), torch.rand(5, 2, device=place.device)
    expert_mlp(x, gate_up, down, index, weight, backend=place.backend).sum().backward()
    alone = gate_up.grad.clone()
    gate_up.grad = None
    x.requires_grad_()
    expert_mlp(x, gate_up, down, index, weight, backend=place.backend).sum().backward()
    assert torch.equal(alone, gate_up.grad)
    assert x.grad is not None
    assert down.grad is None
    with torch.no_grad():
        assert not expert_mlp(x, gate_up, down, index, weight, backend=place.backend).requires_grad


def test_what_does_not_fit_is_refused() -> None:
    """One sentence with shapes or dtypes."""
    x, gate_up, down = torch.zeros(3, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6)
    index, weight = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    with pytest.raises(KernelError, match=r"do not fit x_TD \(3, 7\)"):
        expert_mlp(x[:, :7], gate_up, down, index, weight)
    with pytest.raises(KernelError, match=r"do not fit"):
        expert_mlp(x, gate_up[:, :6], down, index, weight)
    with pytest.raises(KernelError, match="flatten"):
        expert_mlp(x[None], gate_up, down, index, weight)
    with pytest.raises(KernelError, match=r"topk_weight_TK \(3, 1\)"):
        expert_mlp(x, gate_up, down, index, weight[:, :1])
    with pytest.raises(KernelError, match="tokens_per_expert"):
        expert_mlp(x, gate_up, down, index, weight, tokens_per_expert=torch.zeros(3))
    with pytest.raises(KernelError, match="weighting='input' is unknown"):
        expert_mlp(x, gate_up, down, index, weight, weighting="input")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=r"bfloat16.*autocast"):
        expert_mlp(x.bfloat16(), gate_up, down, index, weight)


def test_library_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree."""
    x = torch.randn(5, 8, requires_grad=True)
    gate_up, down = torch.randn(3, 12, 8, requires_grad=True), torch.randn(3, 8, 6, requires_grad=True)
    index, weight = torch.rand(5, 3).argsort(-1)[:, :2], torch.rand(5, 2, requires_grad=True)
    op = torch.ops.moe_kernels.expert_mlp.default
    torch.library.opcheck(op, (x, gate_up, down, index, weight, None, 0, "after", False, True, "torch"))
    fewer = [tensor.detach()[:-1].clone().requires_grad_() for tensor in (gate_up, down)]
    torch.library.opcheck(op, (x, *fewer, index, weight, None, 1, "before", False, True, "torch"))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_as_one_graph(autocast: bool) -> None:
    """torch.compile(fullgraph=True) of router and experts, forward and backward."""
    gate_up, down = torch.randn(4, 16, 8, requires_grad=True), torch.randn(4, 8, 8, requires_grad=True)
    x, router = torch.randn(9, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            route = topk_route(x @ router.t(), top_k=2)
            return expert_mlp(x, gate_up, down, route.topk_index_TK, route.topk_weight_TK).float().sum()

    leaves = [x, router, gate_up, down]
    want = torch.autograd.grad(layer(x), leaves)
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), leaves)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_once_for_any_number_of_tokens() -> None:
    """Dynamic shapes: another batch size neither breaks the graph nor changes the values."""
    gate_up, down = torch.randn(4, 16, 8), torch.randn(4, 8, 8)

    def layer(logits: Tensor, x: Tensor) -> Tensor:
        route = topk_route(logits, torch.zeros(4), top_k=2)
        counts = route.tokens_per_expert_E
        return expert_mlp(x, gate_up, down, route.topk_index_TK, route.topk_weight_TK, tokens_per_expert=counts)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.compiler.set_stance("default"):
        for n_tokens in (9, 17, 5):
            logits, x = torch.randn(n_tokens, 4), torch.randn(n_tokens, 8)
            torch.testing.assert_close(compiled(logits, x), layer(logits, x))
            if n_tokens == 9:
                torch.compiler.set_stance("fail_on_recompile")


def test_activation_checkpoint_gives_the_same_gradients() -> None:
    """Recomputing the forward in the backward changes nothing."""
    from torch.utils.checkpoint import checkpoint

    x, gate_up, down = torch.randn(5, 8), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    index, weight = torch.rand(5, 3).argsort(-1)[:, :2], torch.rand(5, 2)
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weight)]
    want = torch.autograd.grad(expert_mlp(x, gate_up, down, index, weight).sum(), leaves)
    y = checkpoint(expert_mlp, x, gate_up, down, index, weight, use_reentrant=False)
    got = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
