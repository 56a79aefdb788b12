"""Does Triton compile these kernels rightly here? Every op, forward and backward, tiny, against torch on CPU.

Compilers have miscompiled gradients on new devices without a word, and a loss curve shows it late or never. The problem
is small enough to run at the first use in every process. It is odd-sized, has experts without rows and ties between
scores; inputs are rounded to the tested dtype first, so that both sides see the same numbers.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import sort_by_expert
from .errors import KernelError
from .gemm import grouped_gemm
from .mlp import expert_mlp
from .routing import topk_route

__all__ = ["check_kernels"]

T, D, F, E, K = 37, 40, 24, 12, 3

# Largest error allowed, relative to the largest value of the reference: room for sums in another order and one rounding
# of intermediates to the dtype, far below what a wrong or missing tile gives.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def check_kernels(device: torch.device | str) -> None:
    """Raise KernelError if any Triton kernel disagrees with the torch reference on this device."""
    device = torch.device(device)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        _check_routing(device)
        for dtype, tolerance in _TOLERANCE.items():
            if device.type == "cpu" and dtype == torch.bfloat16:
                continue  # the interpreter's bf16 product is not right; it is not the compiler under test either
            _check_experts(device, dtype, tolerance)


def _check_routing(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(T, E, generator=g).mul(4).round().div(4)  # few distinct values: many ties
    g_weight, g_scores = torch.randn(T, K, generator=g), torch.randn(T, E, generator=g)
    # Sums of a group's scores may differ in the last bit between devices, so the bias keeps groups apart.
    bias = torch.arange(E) // 3 * 2.0
    cases: list[dict[str, Any]] = [
        {"score_func": "sigmoid", "topk_method": "greedy"},
        {"score_func": "softmax", "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    ]
    for case in cases:
        outcomes = []
        for where, backend in (("cpu", "torch"), (device, "triton")):
            leaf = logits.to(where, copy=True).requires_grad_()
            chosen_bias = None if case["topk_method"] == "greedy" else bias.to(where)
            out = topk_route(leaf, chosen_bias, top_k=K, backend=backend, **case)
            torch.autograd.backward(
                [out.topk_weight_TK, out.scores_TE], [g_weight.to(where), g_scores.to(where)], inputs=[leaf]
            )
            outcomes.append((*out, leaf.grad))
        for name, want, got in zip(("index", "weight", "scores", "counts", "d_logits"), *outcomes, strict=True):
            _compare(f"topk_route {name}", want, got, 1e-5 if want.is_floating_point() else 0.0, device)
        index = outcomes[0][0]
        for want, got in zip(
            sort_by_expert(index, E, backend="torch"),
            sort_by_expert(index.to(device), E, backend="triton"),
            strict=True,
        ):
            _compare("sort_by_expert", want, got, 0.0, device)


def _check_experts(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(E - 2, generator=g)[:K] for _ in range(T)])  # the last two experts stay empty
    x = torch.randn(T, D, generator=g).to(dtype)
    gate_up = torch.randn(E, 2 * F, D, generator=g).div(D**0.5).to(dtype)
    down = torch.randn(E, D, F, generator=g).div(F**0.5).to(dtype)
    weight = torch.rand(T, K, generator=g)
    dy = torch.randn(T, D, generator=g).to(dtype)
    offsets = sort_by_expert(index, E, backend="torch").offsets_E1
    rows = torch.randn(T * K, D, generator=g).to(dtype)
    d_rows = torch.randn(T * K, 2 * F, generator=g).to(dtype)
    outcomes = []
    for where, backend, run_dtype in (("cpu", "torch", torch.float32), (device, "triton", dtype)):
        a, b, c = (t.to(where, run_dtype, copy=True).requires_grad_() for t in (x, gate_up, down))
        w = weight.to(where, copy=True).requires_grad_()
        y = expert_mlp(a, b, c, index.to(where), w, backend=backend)
        y.backward(dy.to(where, run_dtype), inputs=[a, b, c, w])
        leaf_rows = rows.to(where, run_dtype, copy=True).requires_grad_()
        leaf_w = gate_up.to(where, run_dtype, copy=True).requires_grad_()
        product = grouped_gemm(leaf_rows, leaf_w, offsets.to(where), backend=backend)
        product.backward(d_rows.to(where, run_dtype), inputs=[leaf_rows, leaf_w])
        grads = [t.grad for t in (a, b, c, w)]
        outcomes.append([y.detach(), *grads, product.detach(), leaf_rows.grad, leaf_w.grad])
    names = [f"expert_mlp {n}" for n in ("y", "dx", "dgate_up", "ddown", "dweight")]
    names += [f"grouped_gemm {n}" for n in ("y", "dx", "dw")]
    for name, want, got in zip(names, *outcomes, strict=True):
        _compare(f"{name} in {str(dtype).removeprefix('torch.')}", want, got, tolerance, device)


def _compare(name: str, want: Tensor, got: Tensor, tolerance: float, device: torch.device) -> None:
    want, got = want.detach().double(), got.detach().cpu().double()
    error = ((want - got).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    if not error <= tolerance:  # also when it is NaN
        from ._triton import VERSION

        raise KernelError(
            f"{name} computed by triton {VERSION} on {device} is off by {error:.1e} of its largest value "
            f"(at most {tolerance:.0e} expected): pass backend='torch' or install another triton"
        )
