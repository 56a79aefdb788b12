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
fp32 weights under autocast are cast once forward and once backward, each just before the product that reads it, and the
copy is dropped after it. Kept from one pass to the other, the copies of all layers would lie beside each other, 2 bytes
a parameter: for Qwen3-30B 1.2 GB a layer, where x and h are 0.9. Casting again is predicted to take 1.0 ms of 17.4.
Products that read fp32 themselves are no way out: the tensor cores take weights from shared memory only, in 16 bits, so
that every tile would be loaded at twice the size, converted in registers and written back.
With weighting="before" the weight scales x instead of a: gate and up are w_r h_r, a_r has no weight, dh_r gets the
factor w_r, and dw_r = dh_r . h_r with the dh_r before that factor. With "none" there is no weight.
Letters: T tokens, D model, F hidden, E experts, K top-k, R = T*K rows sorted by expert (see `dispatch.py`).

`mlp_torch.py` is the reference, `mlp_batches.py` the way of bf16 on a CPU, `mlp_triton.py` launches the kernels, in
which rows are gathered and activated, and `mlp_fp8.py` multiplies in 8 bits. Here rows are sorted, for all of them, and
the library op is made of them.

Example: D = F = 1, T = 1, K = 2, x = 1, silu(gate) * up = 2 and 3, down = 10 and 20, weights 0.5 and 0.25 ->
y = 10*(0.5*2) + 20*(0.25*3) = 25.
"""

from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from . import mlp_batches, mlp_fp8, mlp_torch, mlp_triton
from .agreement import Check, E, K, Side, T, normal, uniform, widths
from .backend import register_check, resolve
from .batches import Batches
from .configs import FP8_CAPABILITY, families, obstacle_to_fp8
from .dispatch import sort_rows
from .errors import KernelError

__all__ = ["expert_mlp"]

_NAME, _NAME_IN_FP8 = "expert_mlp", "expert_mlp in fp8"  # what is checked before its first use


def expert_mlp(
    x_TD: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    topk_index_TK: Tensor,
    topk_weight_TK: Tensor,
    *,
    tokens_per_expert: Tensor | None = None,
    null_experts: int = 0,
    weighting: Literal["after", "before", "none"] = "after",
    fp8: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y_TD: every token through its K experts, summed with its weights. Dropless; no host synchronisation on CUDA.

    x_TD: fp32, bf16 or fp16. gate_up_EFD: (E, 2F, D), gate rows first. down_EDF: (E, D, F). topk_index_TK: integers in
    [0, E + null_experts). topk_weight_TK: fp32. tokens_per_expert: counts of topk_index_TK when the router has them;
    else counted. null_experts: how many numbers from E on stand for no expert: they add nothing and cost no product.
    weighting: where a choice's weight enters: "after", on the expert's result, as in DeepSeek and most others;
    "before", on its input, as in Llama 4; "none", nowhere, and its gradient is zero.
    fp8: multiply in 8 bits with scales of tiles, in both passes (`mlp_fp8.py`); dtypes of results and gradients stay.
    It needs bf16 around it, weighting "after", and on a GPU compute capability 8.9.
    Differentiable in x, both weights and topk_weight. Under autocast it computes in the autocast dtype, and gradients
    of fp32 parameters are fp32. Equal inputs on one device give equal bits, forward and backward.
    """
    _check(x_TD, gate_up_EFD, down_EDF, topk_index_TK, topk_weight_TK, tokens_per_expert, null_experts)
    if weighting not in ("after", "before", "none"):
        raise KernelError(f"weighting={weighting!r} is unknown: use 'after', 'before' or 'none'")
    device_type = x_TD.device.type
    if torch.is_autocast_enabled(device_type):
        x_TD = x_TD.to(torch.get_autocast_dtype(device_type))
    elif not x_TD.dtype == gate_up_EFD.dtype == down_EDF.dtype:
        raise KernelError(
            f"x_TD is {x_TD.dtype}, gate_up_EFD {gate_up_EFD.dtype} and down_EDF {down_EDF.dtype}: "
            "cast them to one dtype or run under torch.autocast"
        )
    leaves = (x_TD, gate_up_EFD, down_EDF, topk_weight_TK)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
    if fp8:
        _check_fp8(x_TD, weighting, backend)
    return _expert_mlp(
        x_TD, gate_up_EFD, down_EDF, topk_index_TK, topk_weight_TK, tokens_per_expert, null_experts, weighting, fp8,
        keep, resolve(backend, x_TD.device, _NAME_IN_FP8 if fp8 else _NAME, x_TD.dtype),
    )[0]  # fmt: skip


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
    if index.dim() != 2 or index.shape[0] != x.shape[0] or index.shape != weight.shape or not index.shape[1]:
        raise KernelError(
            f"topk_index_TK {tuple(index.shape)} and topk_weight_TK {tuple(weight.shape)} must both be "
            f"({x.shape[0]}, top_k)"
        )
    if counts is not None and counts.shape != (n_experts + null_experts,):
        raise KernelError(f"tokens_per_expert has shape {tuple(counts.shape)}: give ({n_experts + null_experts},)")


def _check_fp8(x: Tensor, weighting: str, backend: str | None) -> None:
    if x.dtype != torch.bfloat16:
        raise KernelError(
            f"fp8=True computes around its products in bfloat16, not {x.dtype}: run under torch.autocast in it"
        )
    if weighting != "after":
        raise KernelError(f"fp8=True takes weighting='after' only, not {weighting!r}: use that, or fp8=False")
    if x.is_cuda and backend != "torch" and (lack := obstacle_to_fp8(x.device)):
        raise KernelError(f"fp8=True {lack}: use fp8=False")


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
    weighting: str,
    fp8: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h, order, place, offsets); weights are cast to x's dtype and only the originals are kept.

    keep: a backward pass may follow; else h is empty, and the kernels do not store it.
    """
    n_experts = len(down)
    order, place, offsets = sort_rows(index, n_experts + null_experts, counts, backend)
    if null_experts:
        offsets = offsets[: n_experts + 1].clone()  # they come last: their rows lie behind every group
    given = (x, gate_up, down, weight, order, place, offsets, null_experts)
    if fp8:
        y, h = mlp_fp8.forward(*given, keep, backend)
    else:
        y, h = _path(backend, x, order, offsets).forward(*given, weighting, keep)
    return y, h, order, place, offsets


@_expert_mlp.register_fake
def _(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    null_experts: int,
    weighting: str,
    fp8: bool,
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
    weighting: str,
    fp8: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_up, ddown, dweight); what `need` says is not needed comes back empty."""
    given = (dy, x, gate_up, down, weight, h, order, place, offsets, need, null_experts)
    if fp8:
        return mlp_fp8.backward(*given, backend)
    return _path(backend, x, order, offsets).backward(*given, weighting)


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
    weighting: str,
    fp8: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need[0] else (0,)),
        gate_up.new_empty(gate_up.shape if need[1] else (0,)),
        down.new_empty(down.shape if need[2] else (0,)),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gate_up, down, _, weight, _, null_experts, weighting, fp8, keep, backend = inputs
    _, h, order, place, offsets = output
    if not keep and any(ctx.needs_input_grad):
        raise KernelError("moe_kernels::expert_mlp was called with keep=False, and has no gradient: give keep=True")
    ctx.mark_non_differentiable(h, order, place, offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate_up, down, weight, h, order, place, offsets)
    ctx.constants = (null_experts, weighting, fp8, backend)


def _backward(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple:
    if dy is None:
        return (None,) * 11
    x_needed, gate_up_needed, down_needed, _, weight_needed = ctx.needs_input_grad[:5]
    need = [x_needed, gate_up_needed, down_needed, weight_needed]
    grads = _expert_mlp_backward(dy, *ctx.saved_tensors, need, *ctx.constants)
    d_x, d_gate_up, d_down, d_weight = (g if needed else None for g, needed in zip(grads, need, strict=True))
    return d_x, d_gate_up, d_down, None, d_weight, *(None,) * 6


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


def _path(backend: str, x: Tensor, order: Tensor, offsets: Tensor) -> ModuleType:
    """Where forward and backward are."""
    if backend == "triton":
        return mlp_triton
    return mlp_batches if Batches.fit(x, offsets, len(order)) else mlp_torch


# self-check


def _probe(side: Side) -> dict[str, Tensor | None]:
    """Few rows: most tokens choose expert 0, some a null one, and the last two of 12 have none. More: two experts share
    them; the most: one has four of five tokens. Each as models train; without gradients; and otherwise, with D and F
    changed over: counts given, masters that lie transposed, and the weight before the experts or nowhere."""
    g = torch.Generator().manual_seed(0)
    few = torch.stack([torch.randperm(E - 2, generator=g)[:K] for _ in range(T)])
    few[:24, 1] = 0
    few[::3, 0] = E
    some = torch.randint(2, (2 * T, K), generator=g)
    many = (torch.arange(14 * T) % 5 == 0).long().unsqueeze(1)
    chosen = {16: (few, E, 1), 64: (some, 2, 0), 128: (many, 2, 0)}  # index, experts, null experts
    found: dict[str, Tensor | None] = {}
    for block, aligned in families(side.tested_dtype):
        (index, n_experts, nulls), (width, hidden) = chosen[block], widths(block, aligned)
        other = "before" if (block == 64) == aligned else "none"  # both among aligned families, and in fp32
        for weighting, (D, F) in (("after", (width, hidden)), (other, (hidden, width))):
            where = f"of {block}-row tiles, {D} by {F}, weighting {weighting}"
            x, counts = side.leaf(normal(len(index), D, make=g)), None
            weight = (uniform(*index.shape, make=g) + 0.5).to(side.device).requires_grad_()  # fp32 on both sides
            gate_up, down = normal(n_experts, 2 * F, D, make=g) / D**0.5, normal(n_experts, D, F, make=g) / F**0.5
            if weighting == "after":
                leaves = side.leaf(gate_up), side.leaf(down)
                experts = leaves
            else:
                counts = index.flatten().bincount(minlength=n_experts + nulls).int().to(side.device)
                leaves = side.master(gate_up.mT.contiguous()), side.master(down.mT.contiguous())
                experts = leaves[0].mT, leaves[1].mT
            given = (x, *experts, index.to(side.device), weight, counts, nulls, weighting, False)
            y, *_ = _expert_mlp(*given, True, side.backend)
            y.backward(side.put(normal(*y.shape, make=g)), inputs=[x, *leaves, weight])
            found |= {f"y {where}": y, f"dx {where}": x.grad, f"dweight {where}": weight.grad}
            found |= {f"dgate_up {where}": leaves[0].grad, f"ddown {where}": leaves[1].grad}
            if weighting == "after":
                with torch.no_grad():
                    found[f"y without gradients {where}"] = _expert_mlp(*given, False, side.backend)[0]
    return found


def _probe_fp8(side: Side) -> dict[str, Tensor | None]:
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
    y, *_ = _expert_mlp(*given, None, 1, "after", True, True, side.backend)
    y.backward(side.put(normal(*y.shape, make=g)), inputs=leaves)
    names = ("dx", "dgate_up", "ddown", "dweight")
    return {"y": y, **{name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}}


register_check(Check(_NAME, _probe))
# What is rounded to bf16 between products may fall on the other side of a step of E4M3, an eighth of a value.
register_check(Check(_NAME_IN_FP8, _probe_fp8, {torch.float32: 1e-2, torch.bfloat16: 0.1}, FP8_CAPABILITY))
