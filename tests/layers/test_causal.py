"""Causal attention on a CPU against its definition in fp64: values and all gradients."""

import pytest
import torch
from torch import Tensor

from moe.layers import causal
from moe.layers.causal import causal_attention

SCALE = 0.3
WITHOUT, TURNED = 6, 4  # numbers of a query and key that have no position, and that have one

Parts = tuple[Tensor, Tensor, Tensor]


def _plain(query: Tensor, expanded: Tensor, k_rope: Tensor) -> Tensor:
    query, expanded = query.transpose(1, 2), expanded.transpose(1, 2)
    key = torch.cat((expanded[..., :WITHOUT], k_rope.unsqueeze(1).expand(-1, query.shape[1], -1, -1)), -1)
    scores = SCALE * query @ key.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ expanded[..., WITHOUT:]).transpose(1, 2)


def _leaves(length: int, value_width: int, dtype: torch.dtype) -> Parts:
    torch.manual_seed(0)
    shapes = ((3, length, 2, WITHOUT + TURNED), (3, length, 2, WITHOUT + value_width), (3, length, TURNED))
    query, expanded, k_rope = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return query, expanded, k_rope


@pytest.mark.parametrize("sequences_together", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "value_width"), [(1, 4), (127, 10), (128, 16), (257, 7)])
def test_equals_the_definition(
    length: int,
    value_width: int,
    dtype: torch.dtype,
    sequences_together: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the length's remainder by a step, values wider and narrower than keys, sequences alone or together."""
    for suffix in ("", "_BF16"):
        queries = getattr(causal, f"_QUERIES{suffix}")
        monkeypatch.setattr(causal, f"_SCORES{suffix}", sequences_together * 2 * queries * length)
    leaves = _leaves(length, value_width, dtype)
    mixed = causal_attention(*leaves, SCALE)
    seed = torch.randn(mixed.shape).to(dtype)
    found = [mixed, *torch.autograd.grad(mixed, leaves, seed)]
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    wanted = [_plain(*exact), *torch.autograd.grad(_plain(*exact), exact, seed.double())]
    within = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= within * want.abs().max().clamp_min(1e-3)


def test_a_backward_pass_inside_autocast_multiplies_as_the_forward_pass_did() -> None:
    """In the dtype of what was given, to the bit."""
    leaves = _leaves(70, 8, torch.float32)
    mixed = causal_attention(*leaves, SCALE)
    wanted = torch.autograd.grad(mixed.square().sum(), leaves)
    mixed = causal_attention(*leaves, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(mixed.square().sum(), leaves)
    assert all(map(torch.equal, found, wanted))


def test_a_tokens_heads_lie_side_by_side() -> None:
    """The output projection reads them as one row without a copy."""
    assert causal_attention(*_leaves(70, 6, torch.float32), SCALE).is_contiguous()


def test_the_library_op_is_sound() -> None:
    """torch's own checks of schema, fake tensors, autograd registration and tracing with dynamic shapes."""
    torch.library.opcheck(torch.ops.moe.causal_attention.default, (*_leaves(5, 4, torch.float32), SCALE))


def test_a_later_token_never_reaches_an_earlier_one() -> None:
    """Not even one that is infinite: only queries from it on are lost."""
    query, expanded, k_rope = (leaf.detach() for leaf in _leaves(100, 4, torch.float32))
    whole = causal_attention(query, expanded, k_rope, SCALE)
    expanded[:, 50, :, :WITHOUT] = torch.inf
    broken = causal_attention(query, expanded, k_rope, SCALE)
    assert torch.equal(broken[:, :50], whole[:, :50])
    assert not broken[:, 50:].isfinite().all()
