# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Routing forward: scores, choice with lowest-index ties, weights, counts and statistics, in one pass over the logits.

Formulae and example are in `routing.py` and `routing_statistics.py`.

Bytes: logits read and scores written, 8 per expert and token; index and weight, 12 per choice. At T = 32768, E = 128,
K = 8 that is 37 MB, 9 us at 4.3 TB/s; with K passes over keys in registers some 20 us are predicted on an H200, and one
launch after one memset. Statistics read nothing again; each has a memset more, and the shares two launches over B E
numbers, which make fp32 of integers. The margins add one atomic per token and expert (4 M, over the bins of every
expert, some 30 us predicted), the rest one per program and expert. Taken from the scores afterwards, the margins are 17
launches, 13 of them over 17 to 34 MB, and the shares and preferences 13 forward and 12 backward, of which 15 are that
large.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .launching import launch
from .routing_statistics import (
    EPS,
    MARGIN_BINS,
    MARGIN_REACH,
    MARGIN_WIDTH,
    count_load,
    margin_histogram,
    select,
    sequence_preferred,
    sequence_shares,
)

__all__ = ["Rule", "Wanted", "route_forward", "tokens_per_program"]


class Rule(NamedTuple):
    """How logits become choices and weights; the arguments of `topk_route` of these names."""

    top_k: int
    score_func: str
    topk_method: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    scale: float

    @property
    def limits_groups(self) -> bool:
        """Whether some groups lose."""
        return self.topk_group < self.n_group


class Wanted(NamedTuple):
    """Which statistics to take, beside the load: of `sequences` sequences, or none of those when it is 0."""

    margins: bool
    sequences: int


# weight (T, K) fp32, scores (T, E) fp32, index (T, K) int64, counts (E,) int32 of all tokens; of the counted ones
# load (E,) int32, margins (E, M) int32, preferred (B, E) int32, shares (B, E) fp32: with no element where not wanted
Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# torch reference


def _mask_losing_groups(biased: Tensor, rule: Rule) -> Tensor:
    grouped = biased.view(biased.shape[0], rule.n_group, -1)
    if rule.topk_method == "noaux_tc":
        group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    else:
        group_score = grouped.amax(-1)
    loses = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, select(group_score, rule.topk_group), False)
    return grouped.masked_fill(loses.unsqueeze(-1), float("-inf")).view_as(biased)


def _forward_torch(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, counted: Tensor | None, rule: Rule, wanted: Wanted
) -> Routed:
    n_experts = logits.shape[1]
    scores = logits.float().sigmoid() if rule.score_func == "sigmoid" else logits.float().softmax(-1)
    biased = scores if bias is None else scores + bias.float()
    if chosen is None:
        index = select(_mask_losing_groups(biased, rule) if rule.limits_groups else biased, rule.top_k)
    else:
        index = chosen.clone()  # a library op may not return what it was given
    weight = scores.gather(1, index)
    if rule.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + EPS)
    load, margins, preferred = (index.new_empty(0, dtype=torch.int32) for _ in range(3))
    shares = scores.new_empty(0)
    if counted is not None:
        load = count_load(index, n_experts, counted)
    if wanted.margins:
        margins = margin_histogram(biased, rule.top_k, counted)
    if wanted.sequences:
        by_score = bias is None and chosen is None and not rule.limits_groups
        best = index if by_score else select(scores, rule.top_k)
        preferred = sequence_preferred(best, n_experts, wanted.sequences, counted)
        shares = sequence_shares(scores, wanted.sequences, counted)
    return weight * rule.scale, scores, index, count_load(index, n_experts), load, margins, preferred, shares


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
def use_largest(key, COUNT: tl.constexpr, USED: tl.constexpr):
    """`key` with the COUNT largest of each row made USED."""
    for _ in tl.static_range(COUNT):
        key = tl.where(key == tl.max(key, 1)[:, None], USED, key)
    return key


@triton.jit
def margin_bin(margin, WIDTH: tl.constexpr, REACH: tl.constexpr, BINS: tl.constexpr):
    """The bin of a margin, even in asinh(margin / WIDTH); of NaN bin 0."""
    far = tl.abs(margin) / WIDTH
    asinh = tl.log(far + tl.sqrt(far * far + 1.0))
    position = (tl.where(margin < 0, -asinh, asinh) / REACH + 1.0) * (BINS / 2)
    position = tl.where(position == position, position, 0.0)
    return tl.minimum(tl.maximum(position, 0.0), BINS - 1.0).to(tl.int32)


@triton.jit
def topk_route_kernel(
    p_logits,
    p_bias,
    p_chosen,
    p_counted,
    p_index,
    p_weight,
    p_scores,
    p_counts,
    p_load,
    p_margins,
    p_preferred,
    p_shares,
    seq_len,
    n_experts,
    scale,
    K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHOSEN: tl.constexpr,
    COUNTED: tl.constexpr,
    MARGINS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    NORMALISE: tl.constexpr,
    WIDTH: tl.constexpr,
    REACH: tl.constexpr,
    BINS: tl.constexpr,
    ONE: tl.constexpr,
    BT: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    """BT tokens of one sequence per program, as a (BT, BG groups, BS experts of a group) tile; K passes take the
    largest key of a row.

    Example: keys of .9 .5 .5 .1 -> the passes take experts 0, 1, 2, 3 in this order.
    """
    USED: tl.constexpr = -0x7FFFFFFFFFFFFFFF  # below every key
    n_blocks = tl.cdiv(seq_len, BT)
    sequence = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_in = (tl.program_id(0) % n_blocks) * BT + tl.arange(0, BT)
    o_t = sequence * seq_len + o_in
    o_g = tl.arange(0, BG)
    o_s = tl.arange(0, BS)
    m_t = o_in < seq_len
    expert_GS = o_g[:, None] * GROUP_SIZE + o_s[None, :]
    real_GS = (o_g < N_GROUP)[:, None] & (o_s < GROUP_SIZE)[None, :]
    expert = tl.reshape(tl.broadcast_to(expert_GS[None, :, :], (BT, BG, BS)), (BT, BG * BS))
    real = tl.reshape(tl.broadcast_to(real_GS[None, :, :], (BT, BG, BS)), (BT, BG * BS))
    place = o_t[:, None] * n_experts + expert
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
        wins = tl.broadcast_to((use_largest(group_key, TOPK_GROUP, USED) == USED)[:, :, None], (BT, BG, BS))
        lost = unique_key(tl.full((BT, BG * BS), float("-inf"), tl.float32), expert)
        key = tl.where(real & (tl.reshape(wins, (BT, BG * BS)) == 0), lost, key)

    o_k = tl.arange(0, BK)
    index = tl.zeros((BT, BK), tl.int64)
    weight = tl.zeros((BT, BK), tl.float32)
    for k in tl.static_range(K):
        if CHOSEN:
            best = tl.load(p_chosen + o_t * K + k, mask=m_t, other=0)
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
    place_k = o_t[:, None] * K + o_k[None, :]
    m_k = m_t[:, None] & (o_k < K)[None, :]
    tl.store(p_index + place_k, index, mask=m_k)
    tl.store(p_weight + place_k, weight * scale, mask=m_k)

    # Sums are of integers: the order of addition cannot matter, and nobody reads them before the kernel ends (relaxed).
    o_col = tl.arange(0, BG * BS)
    col_expert = (o_col // BS) * GROUP_SIZE + o_col % BS
    counts = tl.sum(((key == USED) & live).to(tl.int32), 0)
    tl.atomic_add(p_counts + col_expert, counts, mask=counts > 0, sem="relaxed")
    if COUNTED:
        live = live & (tl.load(p_counted + o_t, mask=m_t, other=0) != 0)[:, None]
        load = tl.sum(((key == USED) & live).to(tl.int32), 0)
        tl.atomic_add(p_load + col_expert, load, mask=load > 0, sem="relaxed")
    if MARGINS:
        if CHOSEN:  # the cut-off is of the largest, whatever was chosen
            key = use_largest(tl.where(real, unique_key(biased, expert), USED), K, USED)
        first_left = key == tl.max(key, 1)[:, None]
        cutoff = tl.sum(tl.where(first_left, biased, 0.0), 1)[:, None]
        bin_ = margin_bin(cutoff - biased, WIDTH, REACH, BINS)
        tl.atomic_add(p_margins + expert * BINS + bin_, 1, mask=live, sem="relaxed")
    if SEQUENCES:
        if HAS_BIAS or CHOSEN or TOPK_GROUP < N_GROUP:
            key = use_largest(tl.where(real, unique_key(scores, expert), USED), K, USED)
        preferred = tl.sum(((key == USED) & live).to(tl.int32), 0)
        tl.atomic_add(p_preferred + sequence * n_experts + col_expert, preferred, mask=preferred > 0, sem="relaxed")
        share = scores / (tl.sum(tl.where(real, scores, 0.0), 1) + 1e-20)[:, None]
        shares = tl.sum(tl.where(live & (share == share), share * ONE, 0.0).to(tl.int64), 0)
        tl.atomic_add(p_shares + sequence * n_experts + col_expert, shares, mask=shares > 0, sem="relaxed")


# launcher

_ONE = 2.0**32  # a share of 1 as an integer: 2**31 of them fit, and what is cut off is below fp32's rounding of 1/256


def tokens_per_program(width: int) -> int:
    """BT for a padded row width: about a thousand scores per program of four warps."""
    return max(1, 1024 // width)


def _forward_triton(
    logits: Tensor, bias: Tensor | None, chosen: Tensor | None, counted: Tensor | None, rule: Rule, wanted: Wanted
) -> Routed:
    n_tokens, n_experts = logits.shape
    logits = logits.contiguous()
    index = torch.empty(n_tokens, rule.top_k, dtype=torch.int64, device=logits.device)
    weight = torch.empty(n_tokens, rule.top_k, dtype=torch.float32, device=logits.device)
    scores = torch.empty(n_tokens, n_experts, dtype=torch.float32, device=logits.device)
    per_sequence = (wanted.sequences, n_experts) if wanted.sequences else (0,)
    counts, load, margins, preferred = (
        torch.zeros(shape, dtype=torch.int32, device=logits.device)
        for shape in (
            (n_experts,),
            (0,) if counted is None else (n_experts,),
            (n_experts, MARGIN_BINS) if wanted.margins else (0,),
            per_sequence,
        )
    )
    shares = torch.zeros(per_sequence, dtype=torch.int64, device=logits.device)
    if n_tokens:
        group_size = n_experts // rule.n_group
        block_g, block_s = triton.next_power_of_2(rule.n_group), triton.next_power_of_2(group_size)
        block_t = tokens_per_program(block_g * block_s)
        sequences = max(wanted.sequences, 1)
        seq_len = n_tokens // sequences
        launch(
            topk_route_kernel,
            (sequences * triton.cdiv(seq_len, block_t),),
            logits,
            logits if bias is None else bias.contiguous(),
            index if chosen is None else chosen.contiguous(),
            index if counted is None else counted.contiguous().view(torch.uint8),
            index,
            weight,
            scores,
            counts,
            load,
            margins,
            preferred,
            shares,
            seq_len,
            n_experts,
            rule.scale,
            K=rule.top_k,
            N_GROUP=rule.n_group,
            TOPK_GROUP=rule.topk_group,
            GROUP_SIZE=group_size,
            SOFTMAX=rule.score_func == "softmax",
            HAS_BIAS=bias is not None,
            CHOSEN=chosen is not None,
            COUNTED=counted is not None,
            MARGINS=wanted.margins,
            SEQUENCES=wanted.sequences > 0,
            GROUP_TOP2=rule.topk_method == "noaux_tc" and group_size > 1,
            NORMALISE=rule.norm_topk_prob,
            WIDTH=MARGIN_WIDTH,
            REACH=MARGIN_REACH,
            BINS=MARGIN_BINS,
            ONE=_ONE,
            BT=block_t,
            BG=block_g,
            BS=block_s,
            BK=triton.next_power_of_2(rule.top_k),
            num_warps=4,
        )
    return weight, scores, index, counts, load, margins, preferred, shares.to(torch.float32) / _ONE


def route_forward(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    counted: Tensor | None,
    rule: Rule,
    wanted: Wanted,
    backend: str,
) -> Routed:
    """What `Routed` says, by the given backend."""
    run = _forward_triton if backend == "triton" else _forward_torch
    return run(logits, bias, chosen, counted, rule, wanted)
