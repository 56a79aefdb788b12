"""Latent attention's causal scores on a CPU, over what its projections gave: nothing is expanded or laid out anew.

    P = softmax(scale Q K^T)  over earlier keys and one's own          O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(P * dO V^T)),   dQ = scale dS K,   dK = scale dS^T Q

As in FlashAttention (arXiv:2205.14135 section 3.1), but in torch's batched products over a few queries and all keys
they may see, so that scores stay in the cache and no softmax is ever rescaled. Long sequences have their P worked out
again in the backward pass; P of short ones, which takes less memory than what is kept anyway, is kept too.

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

_QUERIES = 64  # of each head at a time
_SCORES = 2**19  # about how many there are at a time: fewer leave two cores idle in bf16, more fall out of the cache


def causal_attention(query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float) -> Tensor:
    """What each head mixes of the values it may see, (B, S, H, V), on a CPU.

    Args:
        query: (B, S, H, W), its last R numbers turned by their positions.
        expanded: (B, S, H, W - R + V), of each head its key without position and then its value.
        k_rope: (B, S, R), the turned part of the keys, which all heads share.
        scale: of the scores before softmax.
    """
    length = query.shape[1]
    kept_anyway = length * (query.shape[3] + expanded.shape[3] + _value_width(query, expanded, k_rope))  # of a head
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in (query, expanded, k_rope))
    return _causal_attention(query, expanded, k_rope, scale, wanted and _pairs(length) <= kept_anyway)[0]


def _value_width(query: Tensor, expanded: Tensor, k_rope: Tensor) -> int:
    return expanded.shape[3] - query.shape[3] + k_rope.shape[2]


def _pairs(length: int) -> int:
    """How many scores of a head there are, those included that a step works out in vain."""
    steps, rest = length // _QUERIES, length % _QUERIES  # torch's symbolic lengths know no divmod
    return _QUERIES * _QUERIES * steps * (steps + 1) // 2 + rest * length


def _pieces(query: Tensor, kept: Tensor) -> Iterator[tuple[slice, list[tuple[int, int, Tensor | None]]]]:
    """Sequences taken together, and of each of their steps: first query, one past the last, where P is kept."""
    batch, length, heads, _ = query.shape
    together = max(1, _SCORES // max(1, heads * _QUERIES * length))
    for first in range(0, batch, together):
        rows, steps = slice(first, min(first + together, batch)), []
        for start in range(0, length, _QUERIES):
            end = min(start + _QUERIES, length)
            here = (rows.stop - rows.start) * heads * (end - start) * end
            place = kept[:here].view(-1, end - start, end) if len(kept) else None
            kept = kept[here:]
            steps.append((start, end, place))
        yield rows, steps


def _by_head(query: Tensor, expanded: Tensor, k_rope: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (heads, S, W) and values (heads, S, V) of some sequences."""
    without = query.shape[3] - k_rope.shape[2]
    parts = expanded[rows].transpose(1, 2)
    key = torch.cat((parts[..., :without], k_rope[rows].unsqueeze(1).expand(-1, parts.shape[1], -1, -1)), -1)
    return query[rows].transpose(1, 2).flatten(0, 1), key.flatten(0, 1), parts[..., without:].flatten(0, 1)


def _probabilities(query: Tensor, key: Tensor, start: int, end: int, scale: float, place: Tensor | None) -> Tensor:
    """P of the queries start … end over keys 0 … end, in its place if it has one; query and key (heads, S, W)."""
    scores = _product(query[:, start:end], key[:, :end].transpose(1, 2), scale)
    later = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
    scores[..., start:].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1, out=place)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a @ b of batches, rounded once."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def _by_token(values: Tensor, heads: int) -> Tensor:
    """(sequences * heads, S, ...) as (sequences, S, heads, ...)."""
    return values.unflatten(0, (-1, heads)).transpose(1, 2)


def _as_given(op: Callable) -> Callable:
    """Products in the dtype of what is given, also where backward is called inside a region of autocast."""

    @wraps(op)
    def run(*args: object, **options: object) -> object:
        with torch.autocast("cpu", enabled=False):
            return op(*args, **options)

    return run


@torch.library.custom_op("moe::causal_attention", mutates_args=())
@_as_given
def _causal_attention(
    query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """(what is mixed, P of all steps or nothing)."""
    batch, length, heads, _ = query.shape
    mixed = query.new_empty(batch, length, heads, _value_width(query, expanded, k_rope))
    kept = query.new_empty(batch * heads * _pairs(length) if keep else 0)
    for rows, steps in _pieces(query, kept):
        q, k, v = _by_head(query, expanded, k_rope, rows)
        for start, end, place in steps:
            p = _probabilities(q, k, start, end, scale, place)
            mixed[rows, start:end] = _by_token(torch.bmm(p, v[:, :end]), heads)
    return mixed, kept


@_causal_attention.register_fake
def _(query: Tensor, expanded: Tensor, k_rope: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    mixed = query.new_empty(batch, length, heads, _value_width(query, expanded, k_rope))
    return mixed, query.new_empty(batch * heads * _pairs(length) if keep else 0)


@torch.library.custom_op("moe::causal_attention_backward", mutates_args=())
@_as_given
def _causal_attention_backward(
    d_mixed: Tensor, query: Tensor, expanded: Tensor, k_rope: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, without = query.shape[2], query.shape[3] - k_rope.shape[2]
    d_query, d_expanded, d_k_rope = (torch.empty(part.shape, dtype=part.dtype) for part in (query, expanded, k_rope))
    wide = torch.promote_types(query.dtype, torch.float32)  # of what every step adds to
    for rows, steps in _pieces(query, kept):
        q, k, v = _by_head(query, expanded, k_rope, rows)
        d_m = d_mixed[rows].transpose(1, 2).flatten(0, 1)
        for start, end, place in reversed(steps):
            p = _probabilities(q, k, start, end, scale, None) if place is None else place
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
def _(
    d_mixed: Tensor, query: Tensor, expanded: Tensor, k_rope: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), expanded.new_empty(expanded.shape), k_rope.new_empty(k_rope.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *parts, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*parts, output[1])


def _backward(ctx: Any, d_mixed: Tensor | None, *unused: Tensor | None) -> tuple:
    if d_mixed is None:
        return (None,) * 5
    return *_causal_attention_backward(d_mixed, *ctx.saved_tensors, ctx.scale), None, None


_causal_attention.register_autograd(_backward, setup_context=_setup_context)
