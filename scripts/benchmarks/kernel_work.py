"""Calls of the public ops that together launch every kernel at every configuration: what is compiled and predicted.

The shapes of `kernel_cases.py`, forward and backward with the router before the experts, then what they leave out:
other dtypes, few rows an expert, sizes that no vector load fits or that Triton does not know to be a multiple of 16,
weights that lie the other way round, other places of the routing weight, null experts, routing by groups or with
choices given, an op by itself, experts in 8 bits, what a benchmark tries beside the table. To be called while launches
are recorded, when tensors have no memory.
"""

from collections.abc import Callable
from typing import Literal

import torch
from kernel_alternatives import alternatives
from kernel_cases import GPU, Case
from torch import Tensor

from moe_kernels import expert_mlp, grouped_gemm, sort_by_expert, topk_route, topk_route_with_statistics

__all__ = ["WORK", "architectures"]

Work = Callable[[], object]


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_()


def _weight(experts: int, outputs: int, inputs: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    if transposed:
        return _leaf(experts, inputs, outputs, dtype=dtype).transpose(1, 2)
    return _leaf(experts, outputs, inputs, dtype=dtype)


def _layer(
    case: Case,
    backward: bool = True,
    *,
    transposed: bool = False,
    weighting: Literal["after", "before", "none"] = "after",
    null_experts: int = 0,
) -> Work:
    """Logits to y, and from dy back to the gradients of logits, x and weights.

    transposed: the weights lie as (E, D, 2F) and (E, F, D), as Llama 4 stores them.
    """

    def run() -> None:
        logits = _leaf(case.tokens, case.experts + null_experts)
        x = _leaf(case.tokens, case.model, dtype=case.dtype)
        gate_up = _weight(case.experts, 2 * case.hidden, case.model, case.weight_dtype, transposed)
        down = _weight(case.experts, case.model, case.hidden, case.weight_dtype, transposed)
        with torch.set_grad_enabled(backward), torch.autocast("cuda", case.dtype, enabled=case.masters):
            index, weight, _, counts = topk_route(logits, top_k=case.top_k, score_func="softmax")
            y = expert_mlp(
                x, gate_up, down, index, weight, tokens_per_expert=counts, null_experts=null_experts,
                weighting=weighting,
            )  # fmt: skip
        if backward:
            torch.autograd.grad(y, [logits, x, gate_up, down], torch.empty_like(y))

    return run


def _fp8(case: Case) -> Work:
    """The experts in 8 bits, forward and backward, of fp32 weights under autocast."""

    def run() -> None:
        x, weight = _leaf(case.tokens, case.model, dtype=torch.bfloat16), _leaf(case.tokens, case.top_k)
        gate_up = _leaf(case.experts, 2 * case.hidden, case.model)
        down = _leaf(case.experts, case.model, case.hidden)
        index = torch.empty(case.tokens, case.top_k, dtype=torch.int64, device="cuda")
        counts = torch.empty(case.experts, dtype=torch.int32, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            y = expert_mlp(x, gate_up, down, index, weight, tokens_per_expert=counts, fp8=True)
        torch.autograd.grad(y, [x, gate_up, down, weight], torch.empty_like(y))

    return run


def _route(experts: int, top_k: int, method: str, n_group: int, topk_group: int, chosen: bool = False) -> Work:
    """Sigmoid scores with a bias, as DeepSeek-V3 routes; gradients of weights and scores."""

    def run() -> None:
        logits, bias = _leaf(8192, experts), torch.empty(experts, device="cuda")
        given = torch.empty(8192, top_k, dtype=torch.int64, device="cuda") if chosen else None
        route = topk_route(
            logits, bias, top_k=top_k, topk_method=method, n_group=n_group, topk_group=topk_group,
            routed_scaling_factor=2.5, chosen_TK=given,
        )  # fmt: skip
        gradients = [torch.empty_like(route.topk_weight_TK), torch.empty_like(route.scores_TE)]
        torch.autograd.grad([route.topk_weight_TK, route.scores_TE], logits, gradients)

    return run


def _statistics(experts: int, top_k: int) -> Work:
    """Routing with padding, margins and balance losses over sequences of 1024 tokens."""

    def run() -> None:
        logits, bias = _leaf(8192, experts), torch.empty(experts, device="cuda")
        counted = torch.empty(8192, dtype=torch.bool, device="cuda")
        route, found = topk_route_with_statistics(
            logits, bias, top_k=top_k, counted_T=counted, count_margins=True, sequences=8
        )
        assert found.shares_BE is not None
        gradients = [torch.empty_like(route.topk_weight_TK), torch.empty_like(found.shares_BE)]
        torch.autograd.grad([route.topk_weight_TK, found.shares_BE], logits, gradients)

    return run


def _within(alternative: str, work: Work) -> Work:
    def run() -> None:
        with alternatives("cuda")[alternative]():
            work()

    return run


def _sort(experts: int) -> Work:
    return lambda: sort_by_expert(torch.empty(8192, 8, dtype=torch.int64, device="cuda"), experts)


def _gemm(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Work:
    def run() -> None:
        x, w = _leaf(rows, inputs, dtype=dtype), _leaf(64, outputs, inputs, dtype=dtype)
        y = grouped_gemm(x, w, torch.empty(65, dtype=torch.int32, device="cuda"))
        torch.autograd.grad(y, [x, w], torch.empty_like(y))

    return run


_QWEN3, _SMALL = GPU["qwen3-30b"], Case(64, 2048, 768, 128, 8)  # 2048 and 4 rows an expert

WORK: dict[str, Work] = {
    **{name: _layer(case) for name, case in GPU.items()},
    **{f"{name}/inference": _layer(case, backward=False) for name, case in GPU.items()},
    "fp32": _layer(Case(2048, 1024, 512, 16, 4, torch.float32)),
    "odd": _layer(Case(1001, 1002, 345, 12, 3)),
    "64-rows-an-expert": _layer(Case(1024, 2048, 768, 128, 8)),
    "4-rows-an-expert": _layer(_SMALL),
    "fp32/4-rows-an-expert": _layer(Case(64, 1024, 512, 64, 4, torch.float32)),
    "odd/4-rows-an-expert": _layer(Case(64, 1002, 345, 64, 4)),
    "transposed": _layer(_QWEN3, transposed=True),
    "alternative-plain": _within("plain", _layer(_QWEN3)),
    "weighting-before": _layer(_QWEN3, weighting="before"),
    "weighting-none": _layer(_QWEN3, weighting="none"),
    "null-experts": _layer(_SMALL._replace(experts=112), null_experts=16),
    # TMA takes rows that are a multiple of 8 numbers; Triton knows of multiples of 16. The self-check is as narrow.
    "8-mod-16": _layer(_QWEN3._replace(model=2056, hidden=776)),
    "8-mod-16/narrow": _layer(_QWEN3._replace(model=120, hidden=72)),
    "route-noaux-tc": _route(256, 8, "noaux_tc", 8, 4),
    "route-group-limited": _route(160, 6, "group_limited_greedy", 8, 3),
    "route-given": _route(256, 8, "noaux_tc", 8, 4, chosen=True),
    "route-statistics": _statistics(256, 8),
    "sort": _sort(512),
    "fp8": _fp8(GPU["deepseek-v3-rank"]._replace(experts=128)),  # whose rows are sorted as Qwen3's are
    "fp8/odd": _fp8(Case(1001, 1002, 345, 12, 3)),
    "gemm-fp32": _gemm(torch.float32, 65536, 2048, 1024),
    "gemm": _gemm(torch.bfloat16, 65536, 2048, 1024),
    "gemm/64-rows-an-expert": _gemm(torch.bfloat16, 4096, 2048, 1024),
    "gemm/4-rows-an-expert": _gemm(torch.bfloat16, 256, 2048, 1024),
}

# One architecture is enough for the rest, which has other numbers in the same configurations: compiling takes time.
_ON_EACH = {
    "qwen3-30b",
    "fine-grained-7b",
    "64-rows-an-expert",
    "4-rows-an-expert",
    "sort",
}


def architectures(name: str) -> tuple[int, ...]:
    """Compute capabilities, times ten, that a piece of work is compiled for."""
    if name.startswith("fp8"):
        return (90, 100) if name == "fp8" else (89,)  # without TMA at sizes that fit nothing
    return (80, 90, 100) if name.removesuffix("/inference") in _ON_EACH else (90,)
