"""Load balancing as pure tensor functions: loads and scores in; biases, losses and measures out.

Loads are `tokens_per_expert`: how many routed rows each of E experts was given. Scores (T, E) are a router's unbiased
scores of T tokens; the losses need them differentiable. `counted_T` (T,) bool leaves out tokens that are padding.
Letters: T tokens, E experts, K chosen per token.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "MARGIN_BINS",
    "count_load",
    "entropy",
    "load_balancing_loss",
    "margin_histogram",
    "max_vio",
    "quantile_update",
    "sequence_loss",
    "sign_update",
    "z_loss",
]

# Margins lie in bins that are even in asinh(margin / _WIDTH): fine where a balanced expert's quantile lies, near 0, and
# of constant relative width away from it. So one set of bins suits sigmoid scores and softmax's much smaller ones.
MARGIN_BINS, _WIDTH, _LARGEST = 256, 1e-3, 8.0
_REACH = math.asinh(_LARGEST / _WIDTH)


def sign_update(expert_bias: Tensor, tokens_per_expert: Tensor, speed: float, *, centre: bool = False) -> Tensor:
    """The bias after one step: b_i + speed * sign(mean load - load_i) (arXiv:2408.15664, Algorithm 1).

    Both (E,); the bias fp32. An expert at the mean exactly keeps its bias. With `centre` the mean of the steps over
    experts is subtracted from each: selection is the same, and the biases' mean stays where it is.
    """
    load = tokens_per_expert.to(torch.float32)
    direction = torch.sign(load.mean() - load)
    return expert_bias + speed * (direction - direction.mean() if centre else direction)


def count_load(topk_index_TK: Tensor, experts: int, counted_T: Tensor | None = None) -> Tensor:
    """Rows each expert was given, (E,) int32; of the tokens `counted_T` (T,) bool says, when it is given."""
    rows = torch.ones_like(topk_index_TK, dtype=torch.int32)
    if counted_T is not None:
        rows = rows * counted_T.unsqueeze(1)
    total = torch.zeros(experts, dtype=torch.int32, device=topk_index_TK.device)
    return total.scatter_add_(0, topk_index_TK.flatten(), rows.flatten())


def margin_histogram(scores_TE: Tensor, expert_bias: Tensor, top_k: int, counted_T: Tensor | None = None) -> Tensor:
    """How far each expert is below each token's cut-off, counted in bins: (E, bins) int32, to add over a global batch.

    The cut-off alpha_t is the (K+1)-th largest of s_t + b, and the margin of expert i is alpha_t - (s_ti + b_i), below
    0 for those chosen. No host sync: bins are a function of the margin alone.
    """
    selection_TE = scores_TE + expert_bias
    margin_TE = selection_TE.topk(top_k + 1, dim=1).values[:, -1:] - selection_TE
    position_TE = (torch.asinh(margin_TE / _WIDTH) / _REACH + 1) * (MARGIN_BINS / 2)
    experts = scores_TE.shape[1]
    row_E = torch.arange(experts, device=scores_TE.device) * MARGIN_BINS
    index = (position_TE.long().clamp_(0, MARGIN_BINS - 1) + row_E).flatten()
    counts = torch.zeros(experts * MARGIN_BINS, dtype=torch.int32, device=scores_TE.device)
    rows = torch.ones_like(index, dtype=torch.int32)
    if counted_T is not None:
        rows = rows.view(-1, experts).mul(counted_T.unsqueeze(1)).flatten()
    return counts.scatter_add_(0, index, rows).view(experts, MARGIN_BINS)


def quantile_update(expert_bias: Tensor, histogram: Tensor, top_k: int, step: float = 1.0) -> Tensor:
    """The biases that would have given each expert its share K/E of the tokens counted (quantile balancing).

    b_i becomes the K/E-quantile over tokens of r_ti = alpha_t - s_ti, minus the mean over experts. With the margins
    m_ti = r_ti - b_i of `margin_histogram` that is b_i + quantile(m_i), here interpolated within the bin. In fp64, from
    integers: ranks that hold the same histogram hold the same biases bit for bit.

    With `step` below 1 the biases go that share of the way only: an exponential moving average over batches, which
    hold fewer tokens than a quantile needs to lie still.
    """
    count = histogram.to(torch.float64)
    below = count.cumsum(1)
    wanted = below[:, -1:] * (top_k / histogram.shape[0])
    bin_ = (below < wanted).sum(1, keepdim=True)
    inside = count.gather(1, bin_).clamp_min(1)
    position = bin_ + 1 - (below.gather(1, bin_) - wanted) / inside
    quantile = _WIDTH * torch.sinh((position * (2 / MARGIN_BINS) - 1) * _REACH)
    moved = expert_bias.to(torch.float64) + step * quantile.squeeze(1)
    # of no token at all there is no quantile: the biases stay
    return torch.where(below[0, -1] > 0, (moved - moved.mean()).to(expert_bias.dtype), expert_bias)


def load_balancing_loss(scores_TE: Tensor, tokens_per_expert: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i (arXiv:2101.03961 eqs 4-6), with f_i = load_i / (K T) and P_i the mean normalised score.

    1 at perfect balance, whatever K; E / K when every token chooses the same experts with all its score. Gradients
    pass through P alone.
    """
    load = tokens_per_expert.to(torch.float32)
    share = load / load.sum().clamp_min(1)
    return scores_TE.shape[1] * (share * _mean(_normalised(scores_TE), counted_T, 0)).sum()


def sequence_loss(scores_TE: Tensor, top_k: int, sequences: int = 1, counted_T: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's balance loss within a sequence (arXiv:2412.19437 eqs 17-20) over its alpha; mean over sequences.

    The T tokens are `sequences` sequences of equal length, one after another. f_i = E / (K S) times the tokens of the
    sequence whose K largest *unbiased* scores include i, regardless of groups; P_i the sequence's mean normalised
    score. 1 at perfect balance.
    """
    experts = scores_TE.shape[1]
    scores_BSE = scores_TE.view(sequences, -1, experts)
    chosen = torch.zeros_like(scores_BSE).scatter_(-1, scores_BSE.detach().topk(top_k, dim=-1).indices, 1.0)
    counted_BS = None if counted_T is None else counted_T.view(sequences, -1)
    share = _mean(chosen, counted_BS, 1) * (experts / top_k)
    losses_B = (share * _mean(_normalised(scores_BSE), counted_BS, 1)).sum(-1)
    return _mean(losses_B.unsqueeze(-1), None if counted_BS is None else counted_BS.any(1), 0).squeeze(-1)


def z_loss(logits_TE: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (arXiv:2202.08906 eq. 5): keeps router logits small."""
    return _mean(logits_TE.to(torch.float32).logsumexp(-1).square().unsqueeze(-1), counted_T, 0).squeeze(-1)


def _mean(values: Tensor, counted: Tensor | None, tokens: int) -> Tensor:
    """Mean over dimension `tokens`, of which `counted` (the dimensions up to it) leaves some out; 0 of none."""
    if counted is None:
        return values.mean(tokens)
    kept = counted.unsqueeze(-1).to(values.dtype)
    return (values * kept).sum(tokens) / kept.sum(tokens).clamp_min(1)


def _normalised(scores: Tensor) -> Tensor:
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


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
