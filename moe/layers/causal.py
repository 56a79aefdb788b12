"""Latent attention's causal scores on a CPU; what its projections gave is all that is kept for the backward pass.

    P = softmax(scale Q K^T)  over earlier keys and one's own          O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(P * dO V^T)),   dQ = scale dS K,   dK = scale dS^T Q

As in FlashAttention (arXiv:2205.14135 section 3.1), but in torch's batched products over a few queries and all keys
they may see, so that scores stay in the cache and no softmax is ever rescaled. Heads are laid out for that a few
sequences at a time, in both passes.

torch's own fused attention on a CPU wants values as wide as keys, all of them laid out by head, and is slow in bf16.
Letters: B sequences, S positions, H heads; W numbers of a query, of which the last R are turned by their position; V
numbers of a value.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_attention"]

_QUERIES, _SCORES = 128, 2**18  # of each head at a time, and about how many scores: more fall out of the cache
_QUERIES_BF16, _SCORES_BF16 = 256, 2**19  # bf16 products are so fast that fewer leave two cores waiting


def causal_attention(query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float) -> Tensor:
    """What each head mixes of the values it may see, (B, S, H, V), on a CPU.

    Args:
        query: (B, S, H, W), its last R numbers turned by their positions.
        expanded: (B, S, H, W - R + V), of each head its key without position and then its value.
        k_rope: (B, S, R), the turned part of the keys, which all heads share.
        scale: of the scores before softmax.
    """
    return _causal_attention(query, expanded, k_rope, scale)


def _empty_result(query: Tensor, expanded: Tensor, k_rope: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], expanded.shape[3] - query.shape[3] + k_rope.shape[2])


def _at_a_time(query: Tensor) -> tuple[int, int]:
    """(queries of a head, scores)."""
    return (_QUERIES_BF16, _SCORES_BF16) if query.dtype == torch.bfloat16 else (_QUERIES, _SCORES)


def _pieces(query: Tensor) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Sequences taken together, and (first query, one past the last) of each of their steps."""
    batch, length, heads, _ = query.shape
    queries, scores = _at_a_time(query)
    together = max(1, scores // max(1, heads * queries * length))
    steps = [(start, min(start + queries, length)) for start in range(0, length, queries)]
    for first in range(0, batch, together):
        yield slice(first, first + together), steps


def _by_head(query: Tensor, expanded: Tensor, k_rope: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (heads, S, W) and values (heads, S, V) of some sequences."""
    without = query.shape[3] - k_rope.shape[2]
    parts = expanded[rows].transpose(1, 2)
    key = torch.cat((parts[..., :without], k_rope[rows].unsqueeze(1).expand(-1, parts.shape[1], -1, -1)), -1)
    return query[rows].transpose(1, 2).flatten(0, 1), key.flatten(0, 1), parts[..., without:].flatten(0, 1)


def _later(query: Tensor) -> Tensor:
    """-inf where a key comes after a query, of as many as are taken at a time; else 0."""
    most = min(query.shape[1], _at_a_time(query)[0])
    return query.new_full((most, most), -torch.inf).triu_(1)


def _probabilities(query: Tensor, key: Tensor, start: int, end: int, scale: float, later: Tensor) -> Tensor:
    """P of the queries start … end over keys 0 … end; query and key (heads, S, W)."""
    scores = _product(query[:, start:end], key[:, :end].transpose(1, 2), scale)
    # both in half of masked_fill_'s time: 83 us of 170 for 32 x 128 x 128 bf16. Zeros first: inf - inf is NaN
    scores[..., start:].tril_().add_(later[: end - start, : end - start])
    return scores.softmax(-1)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a @ b of batches, rounded once."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def _by_token(values: Tensor, heads: int) -> Tensor:
    """(sequences * heads, S, ...) as (sequences, S, heads, ...)."""
    return values.unflatten(0, (-1, heads)).transpose(1, 2)


def _as_given(op: Callable) -> Callable:
    """The op with products in the dtype of what is given, also where backward is called inside autocast."""

    @wraps(op)
    def run(*args: object, **options: object) -> object:
        with torch.autocast("cpu", enabled=False):
            return op(*args, **options)

    return run


@torch.library.custom_op("moe::causal_attention", mutates_args=())
@_as_given
def _causal_attention(query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float) -> Tensor:
    mixed, later = _empty_result(query, expanded, k_rope), _later(query)
    for rows, steps in _pieces(query):
        q, k, v = _by_head(query, expanded, k_rope, rows)
        for start, end in steps:
            p = _probabilities(q, k, start, end, scale, later)
            mixed[rows, start:end] = _by_token(torch.bmm(p, v[:, :end]), query.shape[2])
    return mixed


@_causal_attention.register_fake
def _(query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float) -> Tensor:
    return _empty_result(query, expanded, k_rope)


@torch.library.custom_op("moe::causal_attention_backward", mutates_args=())
@_as_given
def _causal_attention_backward(
    d_mixed: Tensor, query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, without = query.shape[2], query.shape[3] - k_rope.shape[2]
    d_query, d_expanded, d_k_rope = (torch.empty(part.shape, dtype=part.dtype) for part in (query, expanded, k_rope))
    later = _later(query)
    for rows, steps in _pieces(query):
        wide = torch.promote_types(query.dtype, torch.float32) if len(steps) > 1 else query.dtype  # of sums over steps
        q, k, v = _by_head(query, expanded, k_rope, rows)
        d_m = d_mixed[rows].transpose(1, 2).flatten(0, 1)
        for start, end in reversed(steps):
            p = _probabilities(q, k, start, end, scale, later)
            d_p = torch.bmm(d_m[:, start:end], v[:, :end].transpose(1, 2))
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_query[rows, start:end] = _by_token(_product(d_s, k[:, :end], scale), heads)
            d_k = _product(d_s.transpose(1, 2), q[:, start:end], scale)
            d_v = torch.bmm(p.transpose(1, 2), d_m[:, start:end])
            if end == query.shape[1]:  # the last step sees all keys: it comes first
                sum_k, sum_v = d_k.to(wide), d_v.to(wide)
            else:
                sum_k[:, :end] += d_k
                sum_v[:, :end] += d_v
        by_token = _by_token(sum_k, heads)
        d_expanded[rows, ..., :without] = by_token[..., :without]
        d_expanded[rows, ..., without:] = _by_token(sum_v, heads)
        d_k_rope[rows] = by_token[..., without:].sum(2)
    return d_query, d_expanded, d_k_rope


@_causal_attention_backward.register_fake
def _(d_mixed: Tensor, query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), expanded.new_empty(expanded.shape), k_rope.new_empty(k_rope.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *parts, ctx.scale = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_causal_attention_backward(d_mixed, *ctx.saved_tensors, ctx.scale), None


_causal_attention.register_autograd(_backward, setup_context=_setup_context)
