"""expert_mlp against a per-token loop in fp64: value and the gradients of x, both weights and the routing weights."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from moe_kernels import expert_mlp, topk_route

# tokens, model, hidden, experts, top-k
CASES = {
    "one-token": (1, 24, 20, 4, 2),
    "one-expert": (7, 33, 5, 1, 1),
    "all-experts": (7, 24, 20, 5, 5),
    "odd": (63, 33, 5, 6, 3),
    "aligned": (63, 24, 16, 8, 2),
    "more-experts-than-rows": (2, 16, 8, 33, 2),
}


def per_token(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, weighting: str = "after"
) -> Tensor:
    """The definition, one token and slot at a time."""
    y = []
    for t, experts in enumerate(index.tolist()):
        total = torch.zeros_like(x[t])
        for k, e in enumerate(experts):
            before = weight[t, k] if weighting == "before" else 1
            after = weight[t, k] if weighting == "after" else 1
            gate, up = (gate_up[e] @ (before * x[t])).chunk(2)
            total = total + after * (down[e] @ (silu(gate) * up))
        y.append(total)
    return torch.stack(y)


def check(
    place: Any,
    leaf: Callable[..., Tensor],
    index: Tensor,
    width: int,
    hidden: int,
    n_experts: int,
    weighting: Literal["after", "before", "none"] = "after",
) -> None:
    """Compare one problem with the loop, gradients included."""
    n_tokens, top_k = index.shape
    x = leaf(n_tokens, width)
    gate_up = leaf(n_experts, 2 * hidden, width, fan_in=width)
    down = leaf(n_experts, width, hidden, fan_in=hidden)
    weight = (torch.rand(n_tokens, top_k) + 0.5).to(place.device).requires_grad_()
    counts = torch.bincount(index.flatten(), minlength=n_experts).int().to(place.device)
    given = counts if top_k > 1 else None  # both ways of counting are used
    y = expert_mlp(
        x, gate_up, down, index.to(place.device), weight,
        tokens_per_expert=given, weighting=weighting, backend=place.backend,
    )  # fmt: skip
    seed = torch.randn(n_tokens, width).to(place.dtype)
    y.backward(seed.to(place.device))

    truth = [t.detach().cpu().double().requires_grad_() for t in (x, gate_up, down, weight)]
    want = per_token(truth[0], truth[1], truth[2], index, truth[3], weighting)
    want.backward(seed.double())
    if weighting == "none":
        truth[3].grad = torch.zeros_like(truth[3])
    assert y.dtype == place.dtype
    place.agree("y", want, y)
    for name, leaf64, got in zip(
        ("dx", "dgate_up", "ddown", "dweight"), truth, (x, gate_up, down, weight), strict=True
    ):
        assert got.grad.dtype == got.dtype
        place.agree(name, leaf64.grad, got.grad)
    for e in (counts == 0).nonzero().flatten().tolist():
        assert not gate_up.grad[e].any()
        assert not down.grad[e].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_the_per_token_loop(place: Any, leaf: Callable[..., Tensor], case: str) -> None:
    """Value and all gradients at odd sizes; experts nobody chose get gradient zero, exactly."""
    n_tokens, width, hidden, n_experts, top_k = CASES[case]
    index = torch.rand(n_tokens, n_experts).argsort(-1)[:, :top_k]
    check(place, leaf, index, width, hidden, n_experts)


@pytest.mark.usefixtures("poisoned_memory")
def test_all_tokens_on_one_expert(place: Any, leaf: Callable[..., Tensor]) -> None:
    """The worst imbalance, over more than one tile of rows."""
    check(place, leaf, torch.full((130, 1), 2), 16, 8, 4)


@pytest.mark.parametrize(
    ("n_tokens", "width", "hidden", "n_experts"), [(200, 64, 24, 4), (520, 72, 136, 2)], ids=["tiles-of-64", "of-128"]
)
@pytest.mark.usefixtures("poisoned_memory")
def test_skewed_loads(
    place: Any, leaf: Callable[..., Tensor], n_tokens: int, width: int, hidden: int, n_experts: int
) -> None:
    """Expert e is chosen 1 / (e + 1)^2 as often as the first; more than one tile of rows and of columns."""
    share = (1 / torch.arange(1, n_experts + 1).square()).expand(n_tokens, -1)
    check(place, leaf, torch.multinomial(share, 1), width, hidden, n_experts)


@pytest.mark.parametrize("weighting", ["before", "none"])
@pytest.mark.parametrize("width", [24, 33])
@pytest.mark.usefixtures("poisoned_memory")
def test_where_the_weight_enters(
    place: Any, leaf: Callable[..., Tensor], weighting: Literal["before", "none"], width: int
) -> None:
    """On the input as in Llama 4, or not at all, when its gradient is zero."""
    check(place, leaf, torch.rand(9, 4).argsort(-1)[:, :2], width, 12, 4, weighting)


def test_equal_inputs_give_equal_bits(place: Any, leaf: Callable[..., Tensor]) -> None:
    """No sum depends on which program came first: value and gradients of two runs are the same."""
    x, gate_up, down = leaf(50, 24), leaf(4, 144, 24, fan_in=24), leaf(4, 24, 72, fan_in=72)
    index = torch.rand(50, 4).argsort(-1)[:, :3].to(place.device)
    weight = torch.rand(50, 3, device=place.device, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        y = expert_mlp(x, gate_up, down, index, weight, backend=place.backend)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, gate_up, down, weight])

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("hidden", [12, 16], ids=["by-pointer", "by-tma"])
def test_strided_inputs(place: Any, leaf: Callable[..., Tensor], hidden: int) -> None:
    """Any strides of activations and choices, and weights that lie the other way round, as Llama 4 stores them."""
    x, gate_up, down = leaf(16, 9), leaf(3, 16, 2 * hidden, fan_in=16), leaf(3, hidden, 16, fan_in=hidden)
    index = torch.rand(9, 3).argsort(-1)[:, ::2].to(place.device)
    weight = torch.rand(2, 9, device=place.device).t()
    views = (x.t(), gate_up.transpose(1, 2), down.transpose(1, 2))
    got = expert_mlp(*views, index, weight, backend=place.backend)
    want = expert_mlp(*(v.contiguous() for v in views), index.contiguous(), weight.contiguous(), backend=place.backend)
    place.agree("y", want, got)
    seed = torch.randn_like(got)
    leaves = [x, gate_up, down]
    pairs = zip(torch.autograd.grad(want, leaves, seed), torch.autograd.grad(got, leaves, seed), strict=True)
    for name, (a, b) in zip(("dx", "dgate_up", "ddown"), pairs, strict=True):
        place.agree(name, a, b)


@pytest.mark.parametrize("given", [False, True], ids=["counted-here", "counted-by-router"])
@pytest.mark.parametrize(
    "index",
    [
        [[0, 3], [4, 1], [3, 4], [2, 0], [0, 1]],  # some, all and none of a token's choices are null
        [[3, 4], [4, 3]],  # nothing is computed at all
    ],
)
@pytest.mark.parametrize("width", [16, 33])
@pytest.mark.usefixtures("poisoned_memory")
def test_null_experts_add_nothing(
    place: Any, leaf: Callable[..., Tensor], index: list[list[int]], given: bool, width: int
) -> None:
    """Choices beyond the three experts: as if those slots were not there, gradients included."""
    choices = torch.tensor(index)
    x, gate_up, down = leaf(len(index), width), leaf(3, 16, width, fan_in=width), leaf(3, width, 8, fan_in=8)
    weight = (torch.rand(choices.shape) + 0.5).to(place.device).requires_grad_()
    counts = torch.bincount(choices.flatten(), minlength=5).int().to(place.device) if given else None
    y = expert_mlp(
        x, gate_up, down, choices.to(place.device), weight, tokens_per_expert=counts, null_experts=2,
        backend=place.backend,
    )  # fmt: skip
    seed = torch.randn(len(index), width).to(place.dtype)
    y.backward(seed.to(place.device))
    truth = [t.detach().cpu().double().requires_grad_() for t in (x, gate_up, down, weight)]
    real = choices < 3
    want = per_token(truth[0], truth[1], truth[2], choices * real, truth[3] * real)
    want.backward(seed.double())
    place.agree("y", want, y)
    leaves = zip(("dx", "dgate_up", "ddown", "dweight"), truth, (x, gate_up, down, weight), strict=True)
    for name, leaf64, got in leaves:
        assert torch.isfinite(got.grad).all(), name
        place.agree(name, leaf64.grad, got.grad)


def test_the_same_expert_twice(place: Any, leaf: Callable[..., Tensor]) -> None:
    """A token may name an expert in two slots; both count."""
    check(place, leaf, torch.tensor([[1, 1], [0, 1], [2, 2]]), 16, 8, 3)


def test_worked_example(place: Any) -> None:
    """The numbers of the file's docstring."""

    def of(*values: float) -> Tensor:
        return torch.tensor(values, dtype=place.dtype, device=place.device)

    gate = 1.2784645  # silu(gate) = 1
    gate_up, down = of(gate, 2, gate, 3).view(2, 2, 1), of(10, 20).view(2, 1, 1)
    index = torch.tensor([[0, 1]], device=place.device)
    weight = torch.tensor([[0.5, 0.25]], device=place.device)
    y = expert_mlp(of(1).view(1, 1), gate_up, down, index, weight, backend=place.backend)
    place.agree("y", torch.tensor([[25.0]]), y)


def test_no_tokens(place: Any, leaf: Callable[..., Tensor]) -> None:
    """A rank that received nothing still gives every parameter a gradient."""
    x, gate_up, down = leaf(0, 16), leaf(3, 8, 16), leaf(3, 16, 4)
    index = torch.empty(0, 2, dtype=torch.int64, device=place.device)
    y = expert_mlp(x, gate_up, down, index, torch.empty(0, 2, device=place.device), backend=place.backend)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert not gate_up.grad.any()
    assert not down.grad.any()


def test_from_logits_to_gradients(place: Any, leaf: Callable[..., Tensor]) -> None:
    """Router and experts together: the gradient of the logits through the weights of the chosen."""
    logits = torch.randn(9, 6, device=place.device, requires_grad=True)
    x, gate_up, down = leaf(9, 16), leaf(6, 16, 16, fan_in=16), leaf(6, 16, 8, fan_in=8)
    route = topk_route(logits, top_k=2, backend=place.backend)
    y = expert_mlp(
        x,
        gate_up,
        down,
        route.topk_index_TK,
        route.topk_weight_TK,
        tokens_per_expert=route.tokens_per_expert_E,
        backend=place.backend,
    )
    y.float().square().sum().backward()
    index = route.topk_index_TK.cpu()
    truth = logits.detach().cpu().double().requires_grad_()
    chosen = truth.sigmoid().gather(1, index)
    weight = chosen / chosen.sum(-1, keepdim=True)
    per_token(*(t.detach().cpu().double() for t in (x, gate_up, down)), index, weight).square().sum().backward()
    # The gradient of normalised weights is a difference of large terms: allow their rounding.
    place.agree("d_logits", truth.grad, logits.grad, 1e-4 if place.dtype == torch.float32 else 0.1)
