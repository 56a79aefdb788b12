"""The expert MLP in bf16 on a CPU: piece after piece of experts, from the rows they gather to what they add.

What `mlp_torch.py` does, in the order in which rows stay in the cache, and in the same buffers for every piece. What
fills experts up (`batches.py`) has the weight 0: it adds nothing to a gradient, and nobody reads its outputs.
"""

import torch
from torch import Tensor

from .batches import Batches
from .combine import sum_slots
from .mlp_torch import scale, weights_of
from .swiglu import swiglu_backward, swiglu_forward

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    null_experts: int,
    weighting: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y, h); h is empty unless `keep`. Its rows lie as slots do, without what fills up; null experts' are 0."""
    top_k = weight.shape[1]
    lie = Batches(offsets, len(order))
    token, before, after = _of_slots(lie, weight, order, weighting)
    kept = x.new_empty(len(order) if keep else 0, gate_up.shape[1])
    kept[len(lie.real_slots) :] = 0  # of null experts
    out = x.new_empty(lie.n_slots, down.shape[1])
    for piece in lie.pieces:
        slots = piece.slots
        h = lie.scratch("h rows", (slots.stop - slots.start, gate_up.shape[1]), x.dtype)
        piece.product(_rows(lie, "x rows", x, token[slots]), gate_up.mT, h)
        if keep:
            torch.index_select(h, 0, lie.real_slots[piece.rows] - slots.start, out=kept[piece.rows])
        h_weighted = h if before is None else scale(h, before[slots])
        piece.product(swiglu_forward(h_weighted, after[slots], lie.scratch), down.mT, out[slots])
    return sum_slots(lie.clear(out), lie.slots_of(place), top_k, "torch"), kept if keep else x.new_empty(0)


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgate_up, ddown, dweight); what `need` says is not needed comes back empty."""
    need_x, need_gate_up, need_down, _ = need
    top_k = weight.shape[1]
    lie = Batches(offsets, len(order))
    token, before, after = _of_slots(lie, weight, order, weighting)
    dy = dy.to(x.dtype)
    d_gate_up, d_down = (
        lie.clear_idle(matrices.new_empty(matrices.shape)) if needed else matrices.new_empty(0)
        for matrices, needed in ((gate_up, need_gate_up), (down, need_down))
    )
    dx_rows = x.new_empty(lie.n_slots if need_x else 0, x.shape[1])
    dw_rows = weight.new_zeros(lie.n_slots, dtype=torch.float32)
    h_row_S = lie.real.cumsum(0).sub_(1)  # what fills an expert up repeats its last row here too
    for piece in lie.pieces:
        slots = piece.slots
        dy_rows, h_rows = _rows(lie, "dy rows", dy, token[slots]), _rows(lie, "h rows", h, h_row_S[slots])
        q = lie.scratch("q rows", (len(dy_rows), down.shape[2]), x.dtype)
        piece.product(dy_rows, down, q)
        h_weighted = h_rows if before is None else scale(h_rows, before[slots])
        dh, wa, dw = swiglu_backward(q, h_weighted, after[slots], lie.scratch)
        if before is not None:
            dw = (dh.float() * h_rows.float()).sum(-1)
            dh = scale(dh, before[slots])
        if weighting != "none":
            dw_rows[slots] = dw
        if need_down:
            piece.wgrad(dy_rows, wa, d_down)
        if need_gate_up:
            piece.wgrad(dh, _rows(lie, "x rows", x, token[slots]), d_gate_up)
        if need_x:
            piece.product(dh, gate_up, dx_rows[slots])
    d_weight = torch.empty(weight.numel(), dtype=torch.float32)
    d_weight[order] = lie.gather(dw_rows)
    d_x = sum_slots(lie.clear(dx_rows), lie.slots_of(place), top_k, "torch") if need_x else dx_rows
    return d_x, d_gate_up, d_down, d_weight.view_as(weight).to(weight.dtype)


def _of_slots(lie: Batches, weight: Tensor, order: Tensor, weighting: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """(token, weight of the input or None, of the output) of every slot, (S,) each."""
    choice = lie.spread(order)
    before, after = weights_of(weight, choice, weighting)
    return choice // weight.shape[1], None if before is None else before * lie.real, after * lie.real


def _rows(lie: Batches, name: str, values: Tensor, index: Tensor) -> Tensor:
    """values[index] in the buffer of that name."""
    rows = lie.scratch(name, (len(index), values.shape[1]), values.dtype)
    return torch.index_select(values, 0, index, out=rows)
