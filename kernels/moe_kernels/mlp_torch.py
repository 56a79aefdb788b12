"""The expert MLP in torch: grouped products and activation one after the other, the reference of `mlp_triton.py`."""

import torch
from torch import Tensor

from .combine import sum_slots
from .gemm_torch import layout_of
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
    """(y, h); h is empty unless `keep`."""
    top_k = weight.shape[1]
    lie = layout_of(x, offsets, len(order), null_experts > 0)
    choice = lie.spread(order)
    h = lie.blank(lie.product(x.index_select(0, choice // top_k), gate_up.mT))
    before, after = _weights(weight, choice, weighting)
    wa = swiglu_forward(h if before is None else _scale(h, before), after)
    out = lie.blank(lie.product(wa, down.mT))
    return sum_slots(out, lie.slots(place), top_k, "torch"), lie.gather(h) if keep else h.new_empty(0)


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
    lie = layout_of(x, offsets, len(order), null_experts > 0)
    choice, h = lie.spread(order), lie.spread(h)
    token = choice // top_k
    dy_rows = dy.to(x.dtype).index_select(0, token)
    q = lie.blank(lie.product(dy_rows, down))
    before, after = _weights(weight, choice, weighting)
    dh, wa, dw_rows = swiglu_backward(q, h if before is None else _scale(h, before), after)
    del q
    if before is not None:
        dw_rows = (dh.float() * h.float()).sum(-1)  # vecdot is in 16 bits under autocast
        dh = _scale(dh, before)
    elif weighting == "none":
        dw_rows.zero_()
    d_down = lie.wgrad(dy_rows, lie.blank(wa), down.dtype) if need_down else down.new_empty(0)
    del dy_rows, wa
    d_weight = torch.empty(weight.numel(), dtype=torch.float32, device=x.device)
    d_weight[order] = lie.gather(lie.blank(dw_rows))
    d_gate_up, d_x = gate_up.new_empty(0), x.new_empty(0)
    if need_gate_up:
        d_gate_up = lie.wgrad(dh, x.index_select(0, token), gate_up.dtype)
    if need_x:
        d_rows = lie.blank(lie.product(dh, gate_up))
        d_x = sum_slots(d_rows, lie.slots(place), top_k, "torch")
    return d_x, d_gate_up, d_down, d_weight.view_as(weight).to(weight.dtype)


def _weights(weight: Tensor, choice: Tensor, weighting: str) -> tuple[Tensor | None, Tensor]:
    """(of the input of each slot or None, of its output), fp32 (S,) each."""
    rows = weight.float().flatten().index_select(0, choice)
    return (None, rows) if weighting == "after" else (rows if weighting == "before" else None, torch.ones_like(rows))


def _scale(h: Tensor, weight: Tensor) -> Tensor:
    """Each row times its weight, in fp32 and rounded once."""
    return torch.mul(h, weight.unsqueeze(1), out=torch.empty_like(h))
