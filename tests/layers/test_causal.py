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


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("sequences_together", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "value_width"), [(1, 4), (63, 10), (64, 16), (150, 7)])
def test_equals_the_definition(
    length: int,
    value_width: int,
    dtype: torch.dtype,
    sequences_together: int,
    keep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the length's remainder by a step, values wider and narrower than keys, sequences alone or together."""
    monkeypatch.setattr(causal, "_SCORES", sequences_together * 2 * 64 * length)
    leaves = _leaves(length, value_width, dtype)
    mixed, kept = torch.ops.moe.causal_attention(*leaves, SCALE, keep)
    assert (len(kept) > 0) == keep
    seed = torch.randn(mixed.shape).to(dtype)
    found = [mixed, *torch.autograd.grad(mixed, leaves, seed)]
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    wanted = [_plain(*exact), *torch.autograd.grad(_plain(*exact), exact, seed.double())]
    within = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= within * want.abs().max().clamp_min(1e-3)


def _bytes_saved(leaves: Parts) -> int:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        causal_attention(*leaves, SCALE)
    return sum(tensor.nbytes for tensor in saved)


def test_probabilities_are_kept_where_they_take_less_than_the_rest() -> None:
    """10 numbers of a query, 6 + 20 of a key and a value, 20 of what is mixed: 56 of a position."""
    for length, scores in ((56, 56 * 56), (57, 0), (200, 0)):
        leaves = _leaves(length, 20, torch.float32)
        assert _bytes_saved(leaves) == sum(leaf.nbytes for leaf in leaves) + 3 * 2 * scores * 4
    wide = _leaves(150, 100, torch.float32)  # 216 of a position; two whole steps of 64 rows, and 22 rows of 150
    assert _bytes_saved(wide) == sum(leaf.nbytes for leaf in wide) + 3 * 2 * (64 * 64 + 64 * 128 + 22 * 150) * 4


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    """Neither under no_grad, as in generating and in a recomputed layer's first pass, nor over what needs none."""
    leaves = _leaves(20, 30, torch.float32)
    with torch.no_grad():
        assert _bytes_saved(leaves) == 0
    query, expanded, k_rope = (leaf.detach() for leaf in leaves)
    assert _bytes_saved((query, expanded, k_rope)) == 0


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


@pytest.mark.parametrize("keep", [True, False])
def test_the_library_op_is_sound(keep: bool) -> None:
    """torch's own checks of schema, fake tensors, autograd registration and tracing with dynamic shapes."""
    torch.library.opcheck(torch.ops.moe.causal_attention.default, (*_leaves(5, 4, torch.float32), SCALE, keep))


def test_a_later_token_never_reaches_an_earlier_one() -> None:
    """Not even one that is infinite: only queries from it on are lost."""
    query, expanded, k_rope = (leaf.detach() for leaf in _leaves(100, 4, torch.float32))
    whole = causal_attention(query, expanded, k_rope, SCALE)
    expanded[:, 50, :, :WITHOUT] = torch.inf
    broken = causal_attention(query, expanded, k_rope, SCALE)
    assert torch.equal(broken[:, :50], whole[:, :50])
    assert not broken[:, 50:].isfinite().all()
