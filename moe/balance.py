"""Load balancing as pure tensor functions: loads and scores in; biases, losses and measures out.

Loads are `tokens_per_expert`: how many routed rows each of E experts was given. Scores (T, E) are a router's unbiased
scores of T tokens; the losses need them differentiable. `counted_T` (T,) bool leaves out tokens that are padding.
`moe_kernels.topk_route` takes the same sums on its way, and `moe.layers.Router` has them from there.
Letters: T tokens, B sequences, E experts, K chosen per token.
"""

import math

import torch
from torch import Tensor

from moe_kernels import routing_statistics
from moe_kernels.routing_statistics import MARGIN_BINS, MARGIN_REACH, MARGIN_WIDTH

__all__ = [
    "MARGIN_BINS",
    "balance_loss",
    "entropy",
    "load_balancing_loss",
    "margin_histogram",
    "max_vio",
    "quantile_update",
    "sequence_loss",
    "sign_update",
    "z_loss",
]


def sign_update(expert_bias: Tensor, tokens_per_expert: Tensor, speed: float, *, centre: bool = False) -> Tensor:
    """The bias after one step: b_i + speed * sign(mean load - load_i) (arXiv:2408.15664, Algorithm 1).

    Both (..., E), each layer by itself; the bias fp32, loads whole numbers and compared as such: an expert at the mean
    exactly keeps its bias, however many tokens there are. With `centre` the mean of the steps over experts is
    subtracted from each: selection is the same, and the biases' mean stays where it is.
    """
    load = tokens_per_expert.to(torch.int64)
    direction = torch.sign(load.sum(-1, keepdim=True) - load.shape[-1] * load).to(torch.float32)
    return expert_bias + speed * (direction - direction.mean(-1, keepdim=True) if centre else direction)


def margin_histogram(scores_TE: Tensor, expert_bias: Tensor, top_k: int, counted_T: Tensor | None = None) -> Tensor:
    """How far each expert is below each token's cut-off, counted in bins: (E, bins) int32, to add over a global batch.

    The cut-off alpha_t is the (K+1)-th largest of s_t + b, and the margin of expert i is alpha_t - (s_ti + b_i), below
    0 for those chosen. No host sync: bins are a function of the margin alone.
    """
    return routing_statistics.margin_histogram(scores_TE + expert_bias, top_k, counted_T)


def quantile_update(expert_bias: Tensor, histogram: Tensor, top_k: int, step: float = 1.0) -> Tensor:
    """The biases that would have given each expert its share K/E of the tokens counted (quantile balancing).

    b_i becomes the K/E-quantile over tokens of r_ti = alpha_t - s_ti, minus the mean over experts. With the margins
    m_ti = r_ti - b_i of `margin_histogram` that is b_i + quantile(m_i), here interpolated within the bin. In fp64, from
    integers: ranks that hold the same histogram hold the same biases bit for bit.

    Biases (..., E) and histograms (..., E, bins), each layer by itself. With `step` below 1 the biases go that share of
    the way only: a moving average over batches, which hold fewer tokens than a quantile needs to lie still.
    """
    count = histogram.to(torch.float64)
    below = count.cumsum(-1)
    wanted = below[..., -1:] * (top_k / histogram.shape[-2])
    bin_ = (below < wanted).sum(-1, keepdim=True)
    inside = count.gather(-1, bin_).clamp_min(1)
    position = bin_ + 1 - (below.gather(-1, bin_) - wanted) / inside
    quantile = MARGIN_WIDTH * torch.sinh((position * (2 / MARGIN_BINS) - 1) * MARGIN_REACH)
    moved = expert_bias.to(torch.float64) + step * quantile.squeeze(-1)
    # of no token at all there is no quantile: the biases stay
    centred = (moved - moved.mean(-1, keepdim=True)).to(expert_bias.dtype)
    return torch.where(below[..., :1, -1] > 0, centred, expert_bias)


def balance_loss(load_BE: Tensor, shares_BE: Tensor, tokens_B: Tensor) -> Tensor:
    """E * sum_i f_i P_i of each of B sets of tokens, and the mean over those that hold a token.

    f_i = load_i / sum_j load_j is the share of choices that fell on expert i, and P_i = shares_i / tokens the mean
    normalised score (`shares_BE` sums it over the tokens). 1 at perfect balance, whatever K; E / K when every token
    chooses the same experts with all its score. Gradients pass through the shares alone.
    """
    f_BE = load_BE / load_BE.sum(1, keepdim=True).clamp_min(1)
    p_BE = shares_BE / tokens_B.clamp_min(1).unsqueeze(1)
    losses_B = load_BE.shape[1] * (f_BE * p_BE).sum(1)
    return losses_B.sum() / tokens_B.count_nonzero().clamp_min(1)  # a set without tokens has no shares: 0


def load_balancing_loss(scores_TE: Tensor, tokens_per_expert: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """`balance_loss` of all tokens together, with their actual load (arXiv:2101.03961 eqs 4-6)."""
    shares_BE = routing_statistics.sequence_shares(scores_TE, 1, counted_T)
    return balance_loss(tokens_per_expert.unsqueeze(0), shares_BE, _tokens(scores_TE, 1, counted_T))


def sequence_loss(scores_TE: Tensor, top_k: int, sequences: int = 1, counted_T: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's balance loss within a sequence (arXiv:2412.19437 eqs 17-20) over its alpha; mean over sequences.

    The T tokens are `sequences` sequences of equal length, one after another. The load is of the K largest *unbiased*
    scores, regardless of groups.
    """
    preferred_TK = routing_statistics.select(scores_TE.detach(), top_k)
    load_BE = routing_statistics.sequence_preferred(preferred_TK, scores_TE.shape[1], sequences, counted_T)
    shares_BE = routing_statistics.sequence_shares(scores_TE, sequences, counted_T)
    return balance_loss(load_BE, shares_BE, _tokens(scores_TE, sequences, counted_T))


def _tokens(scores_TE: Tensor, sequences: int, counted_T: Tensor | None) -> Tensor:
    """Tokens counted of each sequence, (B,)."""
    if counted_T is None:
        return scores_TE.new_full((sequences,), len(scores_TE) // sequences, dtype=torch.int64)
    return counted_T.view(sequences, -1).sum(1)


def z_loss(logits_TE: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (arXiv:2202.08906 eq. 5): keeps router logits small."""
    return _mean(logits_TE.to(torch.float32).logsumexp(-1).square().unsqueeze(-1), counted_T, 0).squeeze(-1)


def _mean(values: Tensor, counted: Tensor | None, tokens: int) -> Tensor:
    """Mean over dimension `tokens`, of which `counted` (the dimensions up to it) leaves some out; 0 of none."""
    if counted is None:
        return values.mean(tokens)
    kept = counted.unsqueeze(-1).to(values.dtype)
    return (values * kept).sum(tokens) / kept.sum(tokens).clamp_min(1)


def max_vio(tokens_per_expert: Tensor) -> Tensor:
    """(largest load - mean load) / mean load over the last dimension; 0 is perfect balance (arXiv:2408.15664 eq. 4).

    A layer without any token has no violation: 0.
    """
    load = tokens_per_expert.to(torch.float32)
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean.clamp_min(torch.finfo(torch.float32).tiny)


def entropy(tokens_per_expert: Tensor) -> Tensor:
    """Entropy of the load over the last dimension divided by ln E: 1 is perfect balance, 0 all on one expert."""
    load = tokens_per_expert.to(torch.float32)
    share = load / load.sum(-1, keepdim=True).clamp_min(1)
    experts = load.shape[-1]
    return torch.special.entr(share).sum(-1) / math.log(experts) if experts > 1 else torch.ones_like(share.sum(-1))
