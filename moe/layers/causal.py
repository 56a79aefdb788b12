"""Causal attention on a CPU that keeps nothing but its inputs: scores are worked out again for the backward pass.

    P = softmax(scale Q K^T)  over earlier keys and one's own          O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(P * dO V^T)),   dQ = scale dS K,   dK = scale dS^T Q

As in FlashAttention (arXiv:2205.14135 section 3.1), but in torch's batched products over a few queries and all keys
they may see, so that scores stay in the cache and no softmax is ever rescaled. torch's own fused attention on a CPU
wants values as wide as keys, and is slow in bf16: 8 sequences of 256, 4 heads of 96 and 64 take 57 ms of one core
forward and backward, and 22 here; in fp32 41 and 33.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_attention"]

_QUERIES = 64  # of each head at a time
_SCORES = 2**18  # about how many there are at a time: fewer leave two cores idle in bf16, more fall out of the cache


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, H, S, V) of queries and keys (B, H, S, D) and values (B, H, S, V), all of one dtype, on a CPU.

    The result lies in memory as (B, S, H, V), so that the heads of a token can be viewed as one row.
    """
    return _causal_attention(query, key, value.contiguous(), scale).transpose(1, 2)


def _pieces(query: Tensor) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Sequences taken together, and (first query, one past the last) of each of their steps."""
    batch, heads, length, _ = query.shape
    together = max(1, _SCORES // max(1, heads * _QUERIES * length))
    steps = [(start, min(start + _QUERIES, length)) for start in range(0, length, _QUERIES)]
    for first in range(0, batch, together):
        yield slice(first, first + together), steps


def _probabilities(query: Tensor, key: Tensor, start: int, end: int, scale: float) -> Tensor:
    """P of the queries start … end over keys 0 … end; query and key (heads, S, D)."""
    none = query.new_zeros(())
    scores = torch.baddbmm(none, query[:, start:end], key[:, :end].transpose(1, 2), beta=0, alpha=scale)
    later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
    scores[..., start:].masked_fill_(later, -torch.inf)
    return scores.softmax(-1)


@torch.library.custom_op("moe::causal_attention", mutates_args=())
def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, length, width = value.shape
    mixed = value.new_empty(batch, length, heads, width)
    by_head = mixed.transpose(1, 2)
    for rows, steps in _pieces(query):
        q, k, v = (part[rows].flatten(0, 1) for part in (query, key, value))
        for start, end in steps:
            found = _probabilities(q, k, start, end, scale) @ v[:, :end]
            by_head[rows, :, start:end] = found.unflatten(0, (-1, heads))
    return mixed


@_causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, length, width = value.shape
    return value.new_empty(batch, length, heads, width)


@torch.library.custom_op("moe::causal_attention_backward", mutates_args=())
def _causal_attention_backward(
    d_mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = query.shape[1]
    d_query, d_key, d_value = (torch.empty(part.shape, dtype=part.dtype) for part in (query, key, value))
    for rows, steps in _pieces(query):
        q, k, v, d_m = (part[rows].flatten(0, 1) for part in (query, key, value, d_mixed.transpose(1, 2)))
        # every step adds to them, so they are fp32 at least
        sum_k, sum_v = (
            part.new_zeros(part.shape, dtype=torch.promote_types(part.dtype, torch.float32)) for part in (k, v)
        )
        for start, end in steps:
            p = _probabilities(q, k, start, end, scale)
            d_p = d_m[:, start:end] @ v[:, :end].transpose(1, 2)
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype).mul_(scale)
            d_query[rows, :, start:end] = (d_s @ k[:, :end]).unflatten(0, (-1, heads))
            sum_k[:, :end] += d_s.transpose(1, 2) @ q[:, start:end]
            sum_v[:, :end] += p.transpose(1, 2) @ d_m[:, start:end]
        d_key[rows], d_value[rows] = sum_k.unflatten(0, (-1, heads)), sum_v.unflatten(0, (-1, heads))
    return d_query, d_key, d_value


@_causal_attention_backward.register_fake
def _(d_mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_causal_attention_backward(d_mixed, *ctx.saved_tensors, ctx.scale), None


_causal_attention.register_autograd(_backward, setup_context=_setup_context)
