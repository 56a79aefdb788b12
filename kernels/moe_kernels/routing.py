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

The choice itself and the bias have no gradient. Letters: T tokens, E experts, K top-k, G groups.

Example: scores .9 .5 .5 .1, no bias, K = 2 -> index 0 1 (the tie goes to expert 1), weights 9/14 5/14,
tokens_per_expert 1 1 0 0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .agreement import Check, E, K, Side, T
from .backend import register_check, resolve
from .errors import KernelError
from .routing_backward import route_backward
from .routing_forward import route_forward

__all__ = ["RouteResult", "topk_route"]

_SCORE_FUNCS = ("sigmoid", "softmax")
_TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


class RouteResult(NamedTuple):
    """What `topk_route` returns."""

    topk_index_TK: Tensor  # int64, as torch's gather and index_select want it; by selection score, descending
    topk_weight_TK: Tensor  # fp32, differentiable
    scores_TE: Tensor  # fp32 unbiased scores, differentiable
    tokens_per_expert_E: Tensor  # int32


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
    _check(logits_TE, expert_bias_E, top_k, score_func, topk_method, n_group, topk_group)
    if chosen_TK is not None and (chosen_TK.shape != (len(logits_TE), top_k) or chosen_TK.dtype != torch.int64):
        raise KernelError(
            f"chosen_TK is {tuple(chosen_TK.shape)} {chosen_TK.dtype}: give ({len(logits_TE)}, {top_k}) torch.int64"
        )
    if topk_method == "greedy":
        n_group = topk_group = 1
    weight, scores, index, counts = _topk_route(
        logits_TE,
        None if expert_bias_E is None else expert_bias_E.detach(),
        chosen_TK,
        top_k,
        score_func,
        topk_method,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        resolve(backend, logits_TE.device),
    )
    return RouteResult(index, weight, scores, counts)


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


# library op


@torch.library.custom_op("moe_kernels::topk_route", mutates_args=())
def _topk_route(
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
    return route_forward(
        logits, bias, chosen, top_k, score_func, topk_method, n_group, topk_group, norm_topk_prob, scale, backend
    )


@_topk_route.register_fake
def _(
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
    n_tokens, n_experts = logits.shape
    return (
        logits.new_empty((n_tokens, top_k), dtype=torch.float32),
        logits.new_empty((n_tokens, n_experts), dtype=torch.float32),
        logits.new_empty((n_tokens, top_k), dtype=torch.int64),
        logits.new_empty((n_experts,), dtype=torch.int32),
    )


@torch.library.custom_op("moe_kernels::topk_route_backward", mutates_args=())
def _topk_route_backward(
    g_weight: Tensor | None,
    g_scores: Tensor | None,
    scores: Tensor,
    index: Tensor,
    score_func: str,
    norm_topk_prob: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return route_backward(g_weight, g_scores, scores, index, score_func, norm_topk_prob, scale, backend)


@_topk_route_backward.register_fake
def _(
    g_weight: Tensor | None,
    g_scores: Tensor | None,
    scores: Tensor,
    index: Tensor,
    score_func: str,
    norm_topk_prob: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, _, score_func, _, _, _, norm_topk_prob, scale, backend = inputs
    _, scores, index, counts = output
    ctx.mark_non_differentiable(index, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, scores)
    ctx.constants = (score_func, norm_topk_prob, scale, backend)
    ctx.logits_dtype = logits.dtype


def _backward(
    ctx: Any,
    g_weight: Tensor | None,
    g_scores: Tensor | None,
    *unused: Tensor | None,
) -> tuple:
    if g_weight is None and g_scores is None:
        return (None,) * 11
    index, scores = ctx.saved_tensors
    d_logits = _topk_route_backward(g_weight, g_scores, scores, index, *ctx.constants)
    return d_logits.to(ctx.logits_dtype), *(None,) * 10


_topk_route.register_autograd(_backward, setup_context=_setup_context)


# self-check


def _probe(side: Side) -> dict[str, Tensor | None]:
    """Both score functions, with and without groups and bias. Logits take few distinct values, so that many tie."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(T, E, generator=g).mul(4).round().div(4)
    g_weight, g_scores = side.put(torch.randn(T, K, generator=g)), side.put(torch.randn(T, E, generator=g))
    # Sums of a group's scores may differ in the last bit between devices, so the bias keeps groups apart.
    bias = side.put(torch.arange(E) // 3 * 2.0)
    chosen = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).to(side.device)
    results: dict[str, Tensor | None] = {}
    for case, given in {
        "greedy": (None, None, K, "sigmoid", "greedy", 1, 1, True, 1.0),
        "noaux_tc": (bias, None, K, "softmax", "noaux_tc", 4, 2, False, 2.5),
        "chosen": (bias, chosen, K, "sigmoid", "noaux_tc", 4, 2, True, 2.5),
    }.items():
        logits = side.leaf(values)
        weight, scores, index, counts = _topk_route(logits, *given, side.backend)
        torch.autograd.backward([weight, scores], [g_weight, g_scores], inputs=[logits])
        found = {"weight": weight, "scores": scores, "index": index, "counts": counts, "d_logits": logits.grad}
        results |= {f"{name} ({case})": value for name, value in found.items()}
    return results


register_check(Check("topk_route", _probe, {torch.float32: 1e-5}))
