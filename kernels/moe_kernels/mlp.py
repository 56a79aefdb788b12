"""The routed experts of a mixture-of-experts layer, from routing decision to weighted sum.

    h_r = x[token r] @ gate_up[e].T          (R, 2F): gate in the first F columns, up in the last F
    a_r = silu(gate) * up                    (R, F)
    o_r = (w_r a_r) @ down[e].T              (R, D)
    y_t = sum over the K rows r of t: o_r

Backward, with dy the gradient of y and q_r = dy[token r] @ down[e]:

    dw_r = q_r . a_r                         so o need not be kept
    da_r = w_r q_r,   ddown[e] = sum_r dy[token r].T (w_r a_r)
    dup  = da silu(gate),   dgate = da up silu'(gate)
    dx_t = sum_r dh_r @ gate_up[e],   dgate_up[e] = sum_r dh_r.T x[token r]

Between forward and backward only x, h and the index arrays are kept: a is computed again, o is never needed.
Letters: T tokens, D model, F hidden, E experts, K top-k, R = T*K rows sorted by expert (see `dispatch.py`).

Example: D = F = 1, T = 1, K = 2, x = 1, silu(gate) * up = 2 and 3, down = 10 and 20, weights 0.5 and 0.25 ->
y = 10*(0.5*2) + 20*(0.25*3) = 25.
"""

from typing import Any

import torch
from torch import Tensor

from .agreement import Check, D, E, F, K, Side, T
from .backend import register_check, resolve
from .combine import sum_slots
from .dispatch import sort_rows
from .errors import KernelError
from .gemm import gemm_dgrad, gemm_forward, gemm_wgrad
from .swiglu import swiglu_backward, swiglu_forward

__all__ = ["expert_mlp"]


def expert_mlp(
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    topk_index_TK: Tensor,
    topk_weight_TK: Tensor,
    *,
    tokens_per_expert: Tensor | None = None,
    null_experts: int = 0,
    backend: str | None = None,
) -> Tensor:
    """y_TD: every token through its K experts, summed with its weights. Dropless; no host synchronisation on CUDA.

    x_TD: fp32, bf16 or fp16. gate_up_EFD: (E, 2F, D), gate rows first. down_EDF: (E, D, F). topk_index_TK: integers in
    [0, E + null_experts). topk_weight_TK: fp32. tokens_per_expert: counts of topk_index_TK when the router has them;
    else counted. null_experts: how many numbers from E on stand for no expert: they add nothing and cost no product.
    Differentiable in x, both weights and topk_weight. Under autocast it computes in the autocast dtype, and gradients
    of fp32 parameters are fp32.
    """
    _check(x_TD, gate_up_EFD, down_EDF, topk_index_TK, topk_weight_TK, tokens_per_expert, null_experts)
    device_type = x_TD.device.type
    if torch.is_autocast_enabled(device_type):
        x_TD = x_TD.to(torch.get_autocast_dtype(device_type))
    elif not x_TD.dtype == gate_up_EFD.dtype == down_EDF.dtype:
        raise KernelError(
            f"x_TD is {x_TD.dtype}, gate_up_EFD {gate_up_EFD.dtype} and down_EDF {down_EDF.dtype}: "
            "cast them to one dtype or run under torch.autocast"
        )
    backend = resolve(backend, x_TD.device)
    return _expert_mlp(
        x_TD, gate_up_EFD, down_EDF, topk_index_TK, topk_weight_TK, tokens_per_expert, null_experts, backend
    )[0]


def _check(
    x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, counts: Tensor | None, null_experts: int
) -> None:
    if x.dim() != 2:
        raise KernelError(f"x_TD has {x.dim()} dimensions: flatten it to (tokens, model)")
    n_experts, width = down.shape[0], x.shape[1]
    hidden = down.shape[-1]
    if gate_up.shape != (n_experts, 2 * hidden, width) or down.shape != (n_experts, width, hidden):
        raise KernelError(
            f"gate_up_EFD {tuple(gate_up.shape)} and down_EDF {tuple(down.shape)} do not fit x_TD {tuple(x.shape)}: "
            "give (experts, 2 * hidden, model) and (experts, model, hidden)"
        )
    if index.dim() != 2 or index.shape[0] != x.shape[0] or index.shape != weight.shape:
        raise KernelError(
            f"topk_index_TK {tuple(index.shape)} and topk_weight_TK {tuple(weight.shape)} must both be "
            f"({x.shape[0]}, top_k)"
        )
    if counts is not None and counts.shape != (n_experts + null_experts,):
        raise KernelError(f"tokens_per_expert has shape {tuple(counts.shape)}: give ({n_experts + null_experts},)")


# by backend


def _forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    null_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_experts, top_k = gate_up.shape[0], index.shape[1]
    order, place, offsets = sort_rows(index, n_experts + null_experts, counts, backend)
    offsets = offsets[: n_experts + 1].clone()  # null experts come last: their rows lie behind every group
    rows = x.index_select(0, order // top_k)
    h = _clear_nulls(gemm_forward(rows, gate_up, offsets, backend), offsets, null_experts)
    del rows
    wa = swiglu_forward(h, weight.float().flatten().index_select(0, order), backend)
    out = gemm_forward(wa, down, offsets, backend)
    return sum_slots(_clear_nulls(out, offsets, null_experts), place, top_k, backend), h, order, place, offsets


def _clear_nulls(rows: Tensor, offsets: Tensor, null_experts: int) -> Tensor:
    """`rows` with those behind the last group set to 0: no product has written them. In place; no sync on CUDA."""
    if null_experts and rows.device.type == "cpu":
        rows[int(offsets[-1]) :] = 0
    elif null_experts:
        rows.masked_fill_((torch.arange(len(rows), device=rows.device) >= offsets[-1]).unsqueeze(1), 0)
    return rows


def _backward_parts(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    h: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    need: list[bool],
    null_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_gate_up, need_down, _ = need
    top_k = weight.shape[1]
    token = order // top_k
    dy_rows = dy.to(x.dtype).index_select(0, token)
    q = _clear_nulls(gemm_dgrad(dy_rows, down, offsets, backend), offsets, null_experts)
    dh, wa, dw_rows = swiglu_backward(q, h, weight.float().flatten().index_select(0, order), backend)
    del q
    d_down = gemm_wgrad(dy_rows, wa, offsets, down.dtype, backend) if need_down else down.new_empty(0)
    del dy_rows, wa
    d_weight = torch.empty(weight.numel(), dtype=torch.float32, device=x.device)
    d_weight[order] = dw_rows
    d_gate_up = gate_up.new_empty(0)
    if need_gate_up:
        d_gate_up = gemm_wgrad(dh, x.index_select(0, token), offsets, gate_up.dtype, backend)
    d_x = x.new_empty(0)
    if need_x:
        d_rows = gemm_dgrad(dh, gate_up, offsets, backend)
        d_x = sum_slots(_clear_nulls(d_rows, offsets, null_experts), place, top_k, backend)
    return d_x, d_gate_up, d_down, d_weight.view_as(weight).to(weight.dtype)


# library op


@torch.library.custom_op("moe_kernels::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    null_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h, order, place, offsets); weights are cast to x's dtype and only the originals are kept."""
    return _forward(x, gate_up, down, index, weight, counts, null_experts, backend)


@_expert_mlp.register_fake
def _(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    null_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = index.numel()
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, gate_up.shape[1])),
        index.new_empty((rows,), dtype=torch.int32),
        index.new_empty((rows,), dtype=torch.int32),
        index.new_empty((gate_up.shape[0] + 1,), dtype=torch.int32),
    )


@torch.library.custom_op("moe_kernels::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    h: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    need: list[bool],
    null_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_up, ddown, dweight); what `need` says is not needed comes back empty."""
    return _backward_parts(dy, x, gate_up, down, weight, h, order, place, offsets, need, null_experts, backend)


@_expert_mlp_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    h: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    need: list[bool],
    null_experts: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need[0] else (0,)),
        gate_up.new_empty(gate_up.shape if need[1] else (0,)),
        down.new_empty(down.shape if need[2] else (0,)),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gate_up, down, _, weight, _, null_experts, backend = inputs
    _, h, order, place, offsets = output
    ctx.mark_non_differentiable(h, order, place, offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_up, down, weight, h, order, place, offsets)
    ctx.constants = (null_experts, backend)


def _backward(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple:
    if dy is None:
        return (None,) * 8
    x_needed, gate_up_needed, down_needed, _, weight_needed = ctx.needs_input_grad[:5]
    need = [x_needed, gate_up_needed, down_needed, weight_needed]
    grads = _expert_mlp_backward(dy, *ctx.saved_tensors, need, *ctx.constants)
    d_x, d_gate_up, d_down, d_weight = (g if needed else None for g, needed in zip(grads, need, strict=True))
    return d_x, d_gate_up, d_down, None, d_weight, None, None, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


# self-check


def _probe(side: Side) -> dict[str, Tensor | None]:
    """The last two experts stay empty; one choice in some is of a null expert."""
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(E - 2, generator=g)[:K] for _ in range(T)])
    index[::3, 0] = E
    index = index.to(side.device)
    x = side.leaf(torch.randn(T, D, generator=g))
    gate_up = side.leaf(torch.randn(E, 2 * F, D, generator=g) / D**0.5)
    down = side.leaf(torch.randn(E, D, F, generator=g) / F**0.5)
    weight = torch.rand(T, K, generator=g).to(side.device).requires_grad_()  # fp32 on both sides
    y, *_ = _expert_mlp(x, gate_up, down, index, weight, None, 1, side.backend)
    y.backward(side.put(torch.randn(T, D, generator=g)), inputs=[x, gate_up, down, weight])
    return {"y": y, "dx": x.grad, "dgate_up": gate_up.grad, "ddown": down.grad, "dweight": weight.grad}


register_check(Check("expert_mlp", _probe))
