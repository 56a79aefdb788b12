"""Choose K of E experts per token, with their gate weights.

    s = score_func(logits)                          fp32; sigmoid or softmax
    b = s + expert_bias                             what selection sees
    group score  noaux_tc: sum of the group's two largest b; group_limited_greedy: its largest
    b[expert of a losing group] = -inf              greedy: no groups
    index = top K of b, ties to the lowest index, ordered by b descending
    w_k = scale * s[index_k] / (sum_j s[index_j] + 1e-20)        without the quotient when norm_topk_prob is off

Backward, with p_k = s[index_k] / (sum + 1e-20) and g the gradient of w:

    ds[index_k] = scale * (g_k - sum_j g_j p_j) / (sum + 1e-20)  normalised;  scale * g_k otherwise
    dlogits = ds * s * (1 - s)    sigmoid;     s * (ds - sum_e ds_e s_e)    softmax

The choice itself and the bias have no gradient. Scores of infinite logits are 1 and 0 under sigmoid; where a score is
NaN, the experts chosen are still different ones in range, and the weights NaN. Letters: T tokens, E experts, K top-k,
G groups, B sequences.

With statistics (`routing_statistics.py`) the shares have a gradient G too, with n = s / (sum_e s_e + 1e-20) and b the
token's sequence:

    ds += (G_b - sum_e G_be n_e) / (sum_e s_e + 1e-20)

Example: scores .9 .5 .5 .1, no bias, K = 2 -> index 0 1 (the tie goes to expert 1), weights 9/14 5/14,
tokens_per_expert 1 1 0 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .agreement import Check, E, K, Side, T, normal, uniform
from .backend import register_check, resolve
from .errors import KernelError
from .routing_backward import route_backward
from .routing_forward import Rule, Wanted, route_forward
from .routing_statistics import MARGIN_BINS

__all__ = ["RouteResult", "RouteStatistics", "topk_route", "topk_route_with_statistics"]

_SCORE_FUNCS = ("sigmoid", "softmax")
_TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


class RouteResult(NamedTuple):
    """What `topk_route` returns."""

    topk_index_TK: Tensor  # int64, as torch's gather and index_select want it; by selection score, descending
    topk_weight_TK: Tensor  # fp32, differentiable
    scores_TE: Tensor  # fp32 unbiased scores, differentiable
    tokens_per_expert_E: Tensor  # int32


class RouteStatistics(NamedTuple):
    """Sums over the counted tokens; see `routing_statistics.py`. None is what was not asked for."""

    load_E: Tensor  # int32 rows of each expert
    margins_EM: Tensor | None  # int32 tokens by bin of their margin
    preferred_BE: Tensor | None  # int32 tokens of each sequence that prefer the expert
    shares_BE: Tensor | None  # fp32 sums of normalised scores of each sequence, differentiable


def topk_route(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None = None,
    *,
    top_k: int,
    score_func: str = "sigmoid",
    topk_method: str = "greedy",
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    chosen_TK: Tensor | None = None,
    backend: str | None = None,
) -> RouteResult:
    """Route each token to `top_k` experts.

    logits_TE: router logits, any float dtype; scores are computed in fp32. expert_bias_E: added for selection only.
    chosen_TK: int64 choices of an earlier call, different experts for a token, to be taken instead of the largest; the
    weights are still those of these logits. Gradients reach the logits through `topk_weight_TK` and `scores_TE`, never
    the bias. No host sync on CUDA.
    """
    return topk_route_with_statistics(
        logits_TE,
        expert_bias_E,
        top_k=top_k,
        score_func=score_func,
        topk_method=topk_method,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
        chosen_TK=chosen_TK,
        backend=backend,
    )[0]


def topk_route_with_statistics(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None = None,
    *,
    top_k: int,
    score_func: str = "sigmoid",
    topk_method: str = "greedy",
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    chosen_TK: Tensor | None = None,
    counted_T: Tensor | None = None,
    count_margins: bool = False,
    sequences: int = 0,
    backend: str | None = None,
) -> tuple[RouteResult, RouteStatistics]:
    """`topk_route`, and in the same pass over the logits the sums that balancing needs.

    They are of all tokens, or of those `counted_T` (T,) bool says. count_margins: take `margins_EM`, for routing to
    K < E experts without groups. sequences: take `preferred_BE` and `shares_BE` of so many sequences of equal length,
    which lie one after another. Gradients reach the logits through `shares_BE` too.
    """
    _check(logits_TE, expert_bias_E, top_k, score_func, topk_method, n_group, topk_group)
    if chosen_TK is not None and (chosen_TK.shape != (len(logits_TE), top_k) or chosen_TK.dtype != torch.int64):
        raise KernelError(
            f"chosen_TK is {tuple(chosen_TK.shape)} {chosen_TK.dtype}: give ({len(logits_TE)}, {top_k}) torch.int64"
        )
    if topk_method == "greedy":
        n_group = topk_group = 1
    _check_statistics(logits_TE, counted_T, count_margins, sequences, top_k, n_group)
    weight, scores, index, counts, load, margins, preferred, shares = _topk_route(
        logits_TE,
        None if expert_bias_E is None else expert_bias_E.detach(),
        chosen_TK,
        counted_T,
        top_k,
        score_func,
        topk_method,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        count_margins,
        sequences,
        resolve(backend, logits_TE.device, "topk_route", logits_TE.dtype),
    )
    statistics = RouteStatistics(
        counts if counted_T is None else load,
        margins if count_margins else None,
        preferred if sequences else None,
        shares if sequences else None,
    )
    return RouteResult(index, weight, scores, counts), statistics


def _check(
    logits: Tensor, bias: Tensor | None, top_k: int, score_func: str, topk_method: str, n_group: int, topk_group: int
) -> None:
    if logits.dim() != 2:
        raise KernelError(f"logits_TE has {logits.dim()} dimensions: flatten it to (tokens, experts)")
    n_experts = logits.shape[1]
    if score_func not in _SCORE_FUNCS:
        raise KernelError(f"score_func={score_func!r} is unknown: use one of {', '.join(_SCORE_FUNCS)}")
    if topk_method not in _TOPK_METHODS:
        raise KernelError(f"topk_method={topk_method!r} is unknown: use one of {', '.join(_TOPK_METHODS)}")
    if bias is not None and bias.shape != (n_experts,):
        raise KernelError(f"expert_bias_E has shape {tuple(bias.shape)}: give one value per expert, ({n_experts},)")
    available = n_experts
    if topk_method != "greedy":
        if n_group < 1 or n_experts % n_group:
            raise KernelError(f"n_group={n_group} must divide the {n_experts} experts")
        if not 1 <= topk_group <= n_group:
            raise KernelError(f"topk_group={topk_group} must lie between 1 and n_group={n_group}")
        available = n_experts // n_group * topk_group
    if not 1 <= top_k <= available:
        raise KernelError(f"top_k={top_k} must lie between 1 and the {available} experts a token may choose from")


def _check_statistics(
    logits: Tensor, counted: Tensor | None, count_margins: bool, sequences: int, top_k: int, n_group: int
) -> None:
    n_tokens, n_experts = logits.shape
    if counted is not None and (counted.shape != (n_tokens,) or counted.dtype != torch.bool):
        raise KernelError(f"counted_T is {tuple(counted.shape)} {counted.dtype}: give ({n_tokens},) torch.bool")
    if count_margins and (n_group > 1 or top_k == n_experts):
        raise KernelError(
            f"count_margins needs a cut-off, which n_group={n_group} and top_k={top_k} of {n_experts} experts do not "
            "have: route without groups and to fewer experts"
        )
    if sequences < 0 or n_tokens % max(sequences, 1):
        raise KernelError(f"sequences={sequences} must divide the {n_tokens} tokens, or be 0")


# library op


@torch.library.custom_op("moe_kernels::topk_route", mutates_args=())
def _topk_route(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    counted: Tensor | None,
    top_k: int,
    score_func: str,
    topk_method: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
    count_margins: bool,
    sequences: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rule = Rule(top_k, score_func, topk_method, n_group, topk_group, norm_topk_prob, scale)
    return route_forward(logits, bias, chosen, counted, rule, Wanted(count_margins, sequences), backend)


@_topk_route.register_fake
def _(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    counted: Tensor | None,
    top_k: int,
    score_func: str,
    topk_method: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
    count_margins: bool,
    sequences: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_tokens, n_experts = logits.shape
    per_sequence = (sequences, n_experts) if sequences else (0,)
    return (
        logits.new_empty((n_tokens, top_k), dtype=torch.float32),
        logits.new_empty((n_tokens, n_experts), dtype=torch.float32),
        logits.new_empty((n_tokens, top_k), dtype=torch.int64),
        logits.new_empty((n_experts,), dtype=torch.int32),
        logits.new_empty((0,) if counted is None else (n_experts,), dtype=torch.int32),
        logits.new_empty((n_experts, MARGIN_BINS) if count_margins else (0,), dtype=torch.int32),
        logits.new_empty(per_sequence, dtype=torch.int32),
        logits.new_empty(per_sequence, dtype=torch.float32),
    )


@torch.library.custom_op("moe_kernels::topk_route_backward", mutates_args=())
def _topk_route_backward(
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
    return route_backward(
        g_weight, g_scores, g_shares, scores, index, counted, score_func, norm_topk_prob, scale, backend
    )


@_topk_route_backward.register_fake
def _(
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
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, counted, _, score_func, _, _, _, norm_topk_prob, scale, _, sequences, backend = inputs
    _, scores, index, *integers, shares = output
    ctx.mark_non_differentiable(index, *integers, *(() if sequences else (shares,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, index, counted)
    ctx.constants = (score_func, norm_topk_prob, scale, backend)
    ctx.logits_dtype = logits.dtype


def _backward(ctx: Any, g_weight: Tensor | None, g_scores: Tensor | None, *others: Tensor | None) -> tuple:
    g_shares = others[-1]
    if g_weight is None and g_scores is None and g_shares is None:
        return (None,) * 14
    d_logits = _topk_route_backward(g_weight, g_scores, g_shares, *ctx.saved_tensors, *ctx.constants)
    return d_logits.to(ctx.logits_dtype), *(None,) * 13


_topk_route.register_autograd(_backward, setup_context=_setup_context)


# self-check


def _probe(side: Side) -> dict[str, Tensor | None]:
    """Both score functions; with and without groups, bias and statistics. Logits take few distinct values, so that many
    tie, and margins lie well inside their bins: scores may differ in the last bit between devices."""
    g = torch.Generator().manual_seed(0)
    values = normal(T, E, make=g).mul(4).round().div(4)
    g_weight, g_scores = normal(T, K, make=g), normal(T, E, make=g)
    expert = torch.arange(E, dtype=torch.float32)
    bias = (expert.div(3).floor() * 2).to(side.device)  # keeps groups apart, whose scores are sums
    slight = (expert % 4 * 0.3).to(side.device)
    chosen = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).to(side.device)
    counted = (uniform(T, make=g) < 0.8).to(side.device)
    results: dict[str, Tensor | None] = {}
    for case, n_tokens, given in (
        ("greedy", T, (None, None, None, K, "sigmoid", "greedy", 1, 1, True, 1.0, False, 0)),
        ("noaux_tc", T, (bias, None, None, K, "softmax", "noaux_tc", 4, 2, False, 2.5, False, 0)),
        ("chosen", T, (bias, chosen, counted, K, "sigmoid", "noaux_tc", 4, 2, True, 2.5, False, 1)),
        ("margins", T - 1, (slight, None, counted[:-1], K, "sigmoid", "noaux_tc", 1, 1, True, 2.5, True, 4)),
    ):
        logits = side.leaf(values[:n_tokens])
        out = _topk_route(logits, *given, side.backend)
        names = ("weight", "scores", "index", "counts", "load", "margins", "preferred", "shares")
        found = {name: value for name, value in zip(names, out, strict=True) if value.numel()}
        seeds = {"weight": g_weight[:n_tokens], "scores": g_scores[:n_tokens], "shares": g_scores[: given[-1]]}
        ends = {name: seed.to(side.device) for name, seed in seeds.items() if name in found}
        grads = torch.autograd.grad([found[name] for name in ends], logits, list(ends.values()))
        results |= {f"{name} ({case})": value for name, value in (found | {"d_logits": grads[0]}).items()}
    return results


# logits of 16 bits are read exactly, and only their gradient is rounded to them
register_check(Check("topk_route", _probe, {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}))
