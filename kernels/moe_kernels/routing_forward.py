# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Routing forward: scores, choice with lowest-index ties, weights, counts. Formulae and example in `routing.py`."""

import torch
from torch import Tensor

from ._triton import on_device_of, tl, triton

__all__ = ["route_forward"]

EPS = 1e-20

# torch reference


def _select(biased: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, descending, ties to the lowest index.

    torch.topk leaves the order of ties open. On CPU only the rows with equal neighbours among the first k+1 are done
    again with unique keys (32k x 256, k = 8: 41 ms against 135 ms for unique keys throughout and 200 ms for a stable
    sort); elsewhere all rows are, because finding such rows would synchronise.
    """
    if biased.device.type != "cpu":
        return _select_unique(biased, k)
    values, index = biased.topk(min(k + 1, biased.shape[1]), dim=-1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1).nonzero().squeeze(-1)
    index = index[:, :k].contiguous()
    if tied.numel():
        index[tied] = _select_unique(biased[tied], k)
    return index


def _select_unique(biased: Tensor, k: int) -> Tensor:
    bits = (biased + 0.0).view(torch.int32)  # + 0.0 makes one zero of the two
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as the floats do
    reverse = torch.arange(biased.shape[1] - 1, -1, -1, device=biased.device)
    key = (ordered.to(torch.int64) << 32) | reverse
    return biased.shape[1] - 1 - (key.topk(k, dim=-1).values & 0xFFFFFFFF)


def _mask_losing_groups(biased: Tensor, topk_method: str, n_group: int, topk_group: int) -> Tensor:
    grouped = biased.view(biased.shape[0], n_group, -1)
    if topk_method == "noaux_tc":
        group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    else:
        group_score = grouped.amax(-1)
    loses = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, _select(group_score, topk_group), False)
    return grouped.masked_fill(loses.unsqueeze(-1), float("-inf")).view_as(biased)


def _forward_torch(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    top_k: int,
    score_func: str,
    topk_method: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_experts = logits.shape[1]
    scores = logits.float().sigmoid() if score_func == "sigmoid" else logits.float().softmax(-1)
    if chosen is None:
        biased = scores if bias is None else scores + bias.float()
        if n_group > topk_group:
            biased = _mask_losing_groups(biased, topk_method, n_group, topk_group)
        index = _select(biased, top_k)
    else:
        index = chosen.clone()  # a library op may not return what it was given
    weight = scores.gather(1, index)
    if norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + EPS)
    counts = torch.zeros(n_experts, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.int32, device=logits.device))
    return weight * scale, scores, index, counts


# kernels


@triton.jit
def unique_key(value, position):
    """int64 that orders as (value ascending, position descending): its maximum is the largest value of lowest position.

    NaN counts as +inf, so that every row has K distinct winners.
    """
    value = tl.where(value == value, value, float("inf")) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - position).to(tl.int64)


@triton.jit
def topk_route_kernel(
    p_logits,
    p_bias,
    p_chosen,
    p_index,
    p_weight,
    p_scores,
    p_counts,
    n_tokens,
    n_experts,
    scale,
    K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    NORMALISE: tl.constexpr,
    BT: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    """BT tokens per program, as a (BT, BG groups, BS experts of a group) tile; K passes take the largest key of a row.

    Example: keys of .9 .5 .5 .1 -> the passes take experts 0, 1, 2, 3 in this order.
    """
    USED: tl.constexpr = -0x7FFFFFFFFFFFFFFF  # below every key
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_g = tl.arange(0, BG)
    o_s = tl.arange(0, BS)
    m_t = o_t < n_tokens
    expert_GS = o_g[:, None] * GROUP_SIZE + o_s[None, :]
    real_GS = (o_g < N_GROUP)[:, None] & (o_s < GROUP_SIZE)[None, :]
    expert = tl.reshape(tl.broadcast_to(expert_GS[None, :, :], (BT, BG, BS)), (BT, BG * BS))
    real = tl.reshape(tl.broadcast_to(real_GS[None, :, :], (BT, BG, BS)), (BT, BG * BS))
    place = o_t[:, None].to(tl.int64) * n_experts + expert
    live = real & m_t[:, None]
    logits = tl.load(p_logits + place, mask=live, other=0.0).to(tl.float32)
    if SOFTMAX:
        logits = tl.where(real, logits, float("-inf"))
        logits = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = logits / tl.sum(logits, 1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    tl.store(p_scores + place, scores, mask=live)
    biased = scores
    if HAS_BIAS:
        biased += tl.load(p_bias + expert, mask=real, other=0.0).to(tl.float32)
    key = tl.where(real, unique_key(biased, expert), USED)

    if TOPK_GROUP < N_GROUP and not CHOSEN:
        biased_TGS = tl.reshape(tl.where(real, biased, float("-inf")), (BT, BG, BS))
        group_score = tl.max(biased_TGS, 2)
        if GROUP_TOP2:
            key_TGS = tl.reshape(key, (BT, BG, BS))
            rest = tl.where(key_TGS == tl.max(key_TGS, 2)[:, :, None], float("-inf"), biased_TGS)
            group_score += tl.max(rest, 2)
        group_key = tl.where((o_g < N_GROUP)[None, :], unique_key(group_score, o_g[None, :]), USED)
        for _ in tl.static_range(TOPK_GROUP):
            group_key = tl.where(group_key == tl.max(group_key, 1)[:, None], USED, group_key)
        wins = tl.broadcast_to((group_key == USED)[:, :, None], (BT, BG, BS))
        lost = unique_key(tl.full((BT, BG * BS), float("-inf"), tl.float32), expert)
        key = tl.where(real & (tl.reshape(wins, (BT, BG * BS)) == 0), lost, key)

    o_k = tl.arange(0, BK)
    index = tl.zeros((BT, BK), tl.int64)
    weight = tl.zeros((BT, BK), tl.float32)
    for k in tl.static_range(K):
        if CHOSEN:
            best = tl.load(p_chosen + o_t.to(tl.int64) * K + k, mask=m_t, other=0)
            taken = live & (expert == best.to(tl.int32)[:, None])
        else:
            largest = tl.max(key, 1)
            taken = key == largest[:, None]
            best = 0x7FFFFFFF - (largest & 0xFFFFFFFF)
        here = (o_k == k)[None, :]
        index = tl.where(here, best[:, None], index)
        weight = tl.where(here, tl.sum(tl.where(taken, scores, 0.0), 1)[:, None], weight)
        key = tl.where(taken, USED, key)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 1) + 1e-20)[:, None]
    place_k = o_t[:, None].to(tl.int64) * K + o_k[None, :]
    m_k = m_t[:, None] & (o_k < K)[None, :]
    tl.store(p_index + place_k, index, mask=m_k)
    tl.store(p_weight + place_k, weight * scale, mask=m_k)
    counts = tl.sum(((key == USED) & live).to(tl.int32), 0)
    o_col = tl.arange(0, BG * BS)
    col_expert = (o_col // BS) * GROUP_SIZE + o_col % BS
    tl.atomic_add(p_counts + col_expert, counts, mask=counts > 0)  # integers: the order of addition cannot matter


# launcher


def tokens_per_program(width: int) -> int:
    """BT for a padded row width: about a thousand scores per program of four warps."""
    return max(1, 1024 // width)


def _forward_triton(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    top_k: int,
    score_func: str,
    topk_method: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_tokens, n_experts = logits.shape
    logits = logits.contiguous()
    index = torch.empty(n_tokens, top_k, dtype=torch.int64, device=logits.device)
    weight = torch.empty(n_tokens, top_k, dtype=torch.float32, device=logits.device)
    scores = torch.empty(n_tokens, n_experts, dtype=torch.float32, device=logits.device)
    counts = torch.zeros(n_experts, dtype=torch.int32, device=logits.device)
    if n_tokens == 0:
        return weight, scores, index, counts
    group_size = n_experts // n_group
    block_g, block_s = triton.next_power_of_2(n_group), triton.next_power_of_2(group_size)
    block_t = tokens_per_program(block_g * block_s)
    with on_device_of(logits):
        topk_route_kernel[(triton.cdiv(n_tokens, block_t),)](
            logits,
            logits if bias is None else bias.contiguous(),
            index if chosen is None else chosen.contiguous(),
            index,
            weight,
            scores,
            counts,
            n_tokens,
            n_experts,
            scale,
            K=top_k,
            N_GROUP=n_group,
            TOPK_GROUP=topk_group,
            GROUP_SIZE=group_size,
            SOFTMAX=score_func == "softmax",
            HAS_BIAS=bias is not None,
            CHOSEN=chosen is not None,
            GROUP_TOP2=topk_method == "noaux_tc" and group_size > 1,
            NORMALISE=norm_topk_prob,
            BT=block_t,
            BG=block_g,
            BS=block_s,
            BK=triton.next_power_of_2(top_k),
            num_warps=4,
        )
    return weight, scores, index, counts


def route_forward(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    top_k: int,
    score_func: str,
    topk_method: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight fp32, scores fp32, index int64, tokens_per_expert int32) by the given backend."""
    run = _forward_triton if backend == "triton" else _forward_torch
    return run(logits, bias, chosen, top_k, score_func, topk_method, n_group, topk_group, norm_topk_prob, scale)
