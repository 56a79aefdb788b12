# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Routing backward: gradient of the logits from those of weights, scores and shares, in one pass over the scores.

Formulae are in `routing.py`. Bytes: scores read and gradient written, 8 per expert and token (34 MB at T = 32768,
E = 128: 8 us at 4.3 TB/s), 4 more when the scores themselves have a gradient; that of the shares is (B, E).
"""

import torch
from torch import Tensor

from ._triton import tl, triton
from .launching import launch
from .routing_forward import tokens_per_program
from .routing_statistics import EPS

__all__ = ["route_backward"]

# torch reference


def _backward_torch(
    g_weight: Tensor | None,
    g_scores: Tensor | None,
    g_shares: Tensor | None,
    scores: Tensor,
    index: Tensor,
    counted: Tensor | None,
    score_func: str,
    norm_topk_prob: bool,
    scale: float,
) -> Tensor:
    d_scores = torch.zeros_like(scores) if g_scores is None else g_scores.float().clone()
    if g_weight is not None:
        g = g_weight.float() * scale
        if norm_topk_prob:
            chosen = scores.gather(1, index)
            total = chosen.sum(-1, keepdim=True) + EPS
            g = (g - (g * chosen / total).sum(-1, keepdim=True)) / total
        d_scores.scatter_add_(1, index, g)
    if g_shares is not None:
        total = scores.sum(-1, keepdim=True) + EPS
        g = g_shares.repeat_interleave(len(scores) // len(g_shares), 0)
        g = (g - (g * scores / total).sum(-1, keepdim=True)) / total
        d_scores += g if counted is None else g * counted.unsqueeze(1)
    if score_func == "sigmoid":
        return d_scores * scores * (1 - scores)
    return scores * (d_scores - (d_scores * scores).sum(-1, keepdim=True))


# kernel


@triton.jit
def topk_route_backward_kernel(
    p_g_weight,
    p_g_scores,
    p_g_shares,
    p_scores,
    p_index,
    p_counted,
    p_d_logits,
    n_tokens,
    seq_len,
    n_experts,
    scale,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_G_WEIGHT: tl.constexpr,
    HAS_G_SCORES: tl.constexpr,
    HAS_G_SHARES: tl.constexpr,
    COUNTED: tl.constexpr,
    NORMALISE: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    """Gradient of the logits from those of weights, scores and shares, BT tokens per program."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    m_t = o_t < n_tokens
    live = m_t[:, None] & (o_e < n_experts)[None, :]
    row = o_t.to(tl.int64) * n_experts
    place = row[:, None] + o_e[None, :]
    scores = tl.load(p_scores + place, mask=live, other=0.0)
    ds = tl.zeros((BT, BE), tl.float32)
    if HAS_G_SCORES:
        ds = tl.load(p_g_scores + place, mask=live, other=0.0)
    if HAS_G_WEIGHT:
        slot = o_t.to(tl.int64) * K
        total = tl.full((BT,), 1e-20, tl.float32)
        dot = tl.zeros((BT,), tl.float32)
        if NORMALISE:
            for k in tl.static_range(K):
                e = tl.load(p_index + slot + k, mask=m_t, other=0)
                s = tl.load(p_scores + row + e, mask=m_t, other=0.0)
                total += s
                dot += s * tl.load(p_g_weight + slot + k, mask=m_t, other=0.0)
            dot /= total
        for k in tl.static_range(K):
            e = tl.load(p_index + slot + k, mask=m_t, other=0).to(tl.int32)
            g = tl.load(p_g_weight + slot + k, mask=m_t, other=0.0)
            if NORMALISE:
                g = (g - dot) / total
            ds += tl.where(o_e[None, :] == e[:, None], (g * scale)[:, None], 0.0)
    if HAS_G_SHARES:
        felt = live
        if COUNTED:
            felt = live & (tl.load(p_counted + o_t, mask=m_t, other=0) != 0)[:, None]
        p_g = p_g_shares + (o_t // seq_len).to(tl.int64)[:, None] * n_experts + o_e[None, :]
        g = tl.load(p_g, mask=felt, other=0.0)
        total = tl.sum(scores, 1) + 1e-20
        ds += (g - (tl.sum(g * scores, 1) / total)[:, None]) / total[:, None]
    if SOFTMAX:  # noqa: SIM108 (a compile-time branch)
        d_logits = scores * (ds - tl.sum(ds * scores, 1)[:, None])
    else:
        d_logits = ds * scores * (1.0 - scores)
    tl.store(p_d_logits + place, d_logits, mask=live)


# launcher


def _backward_triton(
    g_weight: Tensor | None,
    g_scores: Tensor | None,
    g_shares: Tensor | None,
    scores: Tensor,
    index: Tensor,
    counted: Tensor | None,
    score_func: str,
    norm_topk_prob: bool,
    scale: float,
) -> Tensor:
    n_tokens, n_experts = scores.shape
    seq_len = n_tokens if g_shares is None else n_tokens // len(g_shares)
    d_logits = torch.empty_like(scores)
    if n_tokens == 0:
        return d_logits
    block_e = triton.next_power_of_2(n_experts)
    block_t = tokens_per_program(block_e)
    launch(
        topk_route_backward_kernel,
        (triton.cdiv(n_tokens, block_t),),
        scores if g_weight is None else g_weight.contiguous(),
        scores if g_scores is None else g_scores.contiguous(),
        scores if g_shares is None else g_shares.contiguous(),
        scores,
        index,
        index if counted is None else counted.contiguous().view(torch.uint8),
        d_logits,
        n_tokens,
        seq_len,
        n_experts,
        scale,
        K=index.shape[1],
        SOFTMAX=score_func == "softmax",
        HAS_G_WEIGHT=g_weight is not None,
        HAS_G_SCORES=g_scores is not None,
        HAS_G_SHARES=g_shares is not None,
        COUNTED=counted is not None,
        NORMALISE=norm_topk_prob,
        BT=block_t,
        BE=block_e,
        num_warps=4,
    )
    return d_logits


def route_backward(
    g_weight: Tensor | None,
    g_scores: Tensor | None,
    g_shares: Tensor | None,
    scores: Tensor,
    index: Tensor,
    counted: Tensor | None,
    score_func: str,
    norm_topk_prob: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """d_logits (T, E) fp32 by the given backend; a gradient that is None counts as zero."""
    run = _backward_triton if backend == "triton" else _backward_torch
    return run(g_weight, g_scores, g_shares, scores, index, counted, score_func, norm_topk_prob, scale)
