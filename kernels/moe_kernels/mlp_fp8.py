"""The routed experts with their products in 8 bits: DeepSeek-V3's recipe (arXiv:2412.19437 §3.3), of `expert_mlp`.

The formulae are those of `mlp.py`. All six products, forward, for the gradients of rows and for those of weights, take
E4M3 operands with a scale for every tile (`quantise.py`) and add up in fp32 every 128 numbers (`fp8_gemm.py`):

    h = Q(x) Q(gate_up).T          o = Q(wa) Q(down).T               Q of rows: 1 x 128, of weights: 128 x 128
    q = Q(dy) Q(down)              dx rows = Q(dh) Q(gate_up)
    ddown = Q'(dy).T Q'(wa)        dgate_up = Q'(dh).T Q'(x)         Q': 128 rows of an expert x 1

What lies between the products is bf16 as elsewhere, and so are x and h, which are kept for the backward pass: no more
and no less than in bf16. x in 8 bits would save nothing, for the router and the shared experts keep it anyway, and
would be rounded twice, for its tiles lie the other way round in the backward pass. h in 8 bits, as DeepSeek keeps it,
would save 2 F bytes a row and put one more error into the activation and its gradient. Quantised weights are dropped
after the product that reads them, like weights cast under autocast.

The torch backend multiplies in fp32 what the 8 bits stand for: the reference, right everywhere and slow.
"""

from typing import Any

import torch
from torch import Tensor

from .agreement import Check, E, K, Side, T, normal, uniform
from .backend import register_check
from .combine import end_of_rows, sum_slots
from .configs import FP8_CAPABILITY
from .dispatch import sort_rows
from .errors import KernelError
from .fp8_gemm import product, starts_of, swiglu_gradient, swiglu_quantised, wgrad
from .quantise import TILE, quantise_columns, quantise_rows, quantise_weight
from .tiles import TileSchedule, schedule_tiles, schedule_tiles_torch

__all__ = ["fp8_expert_mlp"]


def _tiles(offsets: Tensor, n_rows: int, backend: str) -> TileSchedule:
    run = schedule_tiles if backend == "triton" else schedule_tiles_torch
    return run(offsets, n_rows, TILE)


# library op


@torch.library.custom_op("moe_kernels::fp8_expert_mlp", mutates_args=())
def fp8_expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    null_experts: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h, order, place, offsets); arguments and results as of `moe_kernels::expert_mlp`, weighting "after"."""
    n_experts, top_k = gate_up.shape[0], index.shape[1]
    order, place, offsets = sort_rows(index, n_experts + null_experts, counts, backend)
    offsets = offsets[: n_experts + 1].clone()  # null experts come last: their rows lie behind every group
    tiles = _tiles(offsets, len(order), backend)
    x8 = quantise_rows(x.contiguous(), backend)
    w8 = quantise_weight(gate_up.contiguous(), False, backend)
    h = product(x8, w8, tiles, offsets, x.dtype, backend, order, top_k)
    del x8, w8
    a8 = swiglu_quantised(h, order, _flat(weight), offsets[-1:], backend)
    if not keep:
        h = h.new_empty(0)
    out = product(a8, quantise_weight(down.contiguous(), False, backend), tiles, offsets, x.dtype, backend)
    return sum_slots(out, place, top_k, backend, end_of_rows(offsets, null_experts)), h, order, place, offsets


@fp8_expert_mlp.register_fake
def _(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    null_experts: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = index.numel()
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, gate_up.shape[1]) if keep else (0,)),
        index.new_empty((rows,), dtype=torch.int32),
        index.new_empty((rows,), dtype=torch.int32),
        index.new_empty((gate_up.shape[0] + 1,), dtype=torch.int32),
    )


@torch.library.custom_op("moe_kernels::fp8_expert_mlp_backward", mutates_args=())
def _fp8_expert_mlp_backward(
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
    need_x, need_gate_up, need_down, _ = need
    top_k, dtype = weight.shape[1], x.dtype
    x, dy = x.contiguous(), dy.to(dtype).contiguous()
    tiles, starts = _tiles(offsets, len(order), backend), starts_of(offsets)
    end = end_of_rows(offsets, null_experts)
    w8 = quantise_weight(down.contiguous(), True, backend)
    q = product(quantise_rows(dy, backend), w8, tiles, offsets, dtype, backend, order, top_k)
    del w8
    dh, wa, d_weight = swiglu_gradient(q, h, order, _flat(weight), offsets[-1:], backend)
    del q
    if end is not None:
        d_weight.masked_fill_(place >= end, 0)  # of slots that no product writes
    d_x, d_gate_up, d_down = x.new_empty(0), gate_up.new_empty(0), down.new_empty(0)
    if need_down:
        dy8, wa8 = quantise_columns(dy, tiles, backend, order, top_k), quantise_columns(wa, tiles, backend)
        d_down = wgrad(dy8, wa8, starts, down.dtype, backend)
        del dy8, wa8
    del wa
    if need_gate_up:
        dh8, x8 = quantise_columns(dh, tiles, backend), quantise_columns(x, tiles, backend, order, top_k)
        d_gate_up = wgrad(dh8, x8, starts, gate_up.dtype, backend)
        del dh8, x8
    if need_x:
        w8 = quantise_weight(gate_up.contiguous(), True, backend)
        d_rows = product(quantise_rows(dh, backend, end), w8, tiles, offsets, dtype, backend)
        d_x = sum_slots(d_rows, place, top_k, backend, end)
    return d_x, d_gate_up, d_down, d_weight.view_as(weight).to(weight.dtype)


@_fp8_expert_mlp_backward.register_fake
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
    x, gate_up, down, _, weight, _, null_experts, keep, backend = inputs
    _, h, order, place, offsets = output
    if not keep and any(ctx.needs_input_grad):
        raise KernelError("moe_kernels::fp8_expert_mlp was called with keep=False, and has no gradient: give keep=True")
    ctx.mark_non_differentiable(h, order, place, offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_up, down, weight, h, order, place, offsets)
    ctx.constants = (null_experts, backend)


def _backward(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple:
    if dy is None:
        return (None,) * 9
    x_needed, gate_up_needed, down_needed, _, weight_needed = ctx.needs_input_grad[:5]
    need = [x_needed, gate_up_needed, down_needed, weight_needed]
    grads = _fp8_expert_mlp_backward(dy, *ctx.saved_tensors, need, *ctx.constants)
    d_x, d_gate_up, d_down, d_weight = (g if needed else None for g, needed in zip(grads, need, strict=True))
    return d_x, d_gate_up, d_down, None, d_weight, None, None, None, None


fp8_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


def _flat(weight: Tensor) -> Tensor:
    return weight.float().flatten()


# self-check


def _probe(side: Side) -> dict[str, Tensor | None]:
    """Most tokens choose expert 0, more than a tile of them; some a null one, and two experts have none. Every product
    has more than one step, tile and column tile, the last ones not whole; magnitudes differ from tile to tile."""
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(E - 2, generator=g)[:K] for _ in range(5 * T)])
    index[:140, 1] = 0
    index[::3, 0] = E
    width, hidden = 328, 200
    x = normal(len(index), width, make=g) * uniform(len(index), 1, make=g).mul(5).exp()
    leaves = [
        side.leaf(x / 30),
        side.leaf(normal(E, 2 * hidden, width, make=g) / width**0.5),
        side.leaf(normal(E, width, hidden, make=g) / hidden**0.5),
        (uniform(*index.shape, make=g) + 0.5).to(side.device).requires_grad_(),  # fp32 on both sides
    ]
    given = (*leaves[:3], index.to(side.device), leaves[3])
    y, *_ = fp8_expert_mlp(*given, None, 1, True, side.backend)
    y.backward(side.put(normal(*y.shape, make=g)), inputs=leaves)
    names = ("dx", "dgate_up", "ddown", "dweight")
    return {"y": y, **{name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}}


# What is rounded to bf16 between products may fall on the other side of a step of E4M3, an eighth of a value.
register_check(Check("fp8_expert_mlp", _probe, {torch.float32: 1e-2, torch.bfloat16: 0.1}, capability=FP8_CAPABILITY))
