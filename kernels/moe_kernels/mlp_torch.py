"""The expert MLP in torch: grouped products and activation one after the other, the reference of `mlp_triton.py`."""

import torch
from torch import Tensor

from .combine import sum_slots
from .gemm_torch import clear_nulls, product, weight_gradient
from .swiglu import swiglu_backward, swiglu_forward

__all__ = ["backward", "forward", "scale", "weights_of"]


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
    h = _product(x.index_select(0, order // top_k), gate_up.mT, offsets, null_experts)
    before, after = weights_of(weight, order, weighting)
    wa = swiglu_forward(h if before is None else scale(h, before), after)
    return sum_slots(_product(wa, down.mT, offsets, null_experts), place, top_k, "torch"), h if keep else h.new_empty(0)


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
    token = order // top_k
    dy_rows = dy.to(x.dtype).index_select(0, token)
    q = _product(dy_rows, down, offsets, null_experts)
    before, after = weights_of(weight, order, weighting)
    dh, wa, dw_rows = swiglu_backward(q, h if before is None else scale(h, before), after)
    del q
    if before is not None:
        dw_rows = (dh.float() * h.float()).sum(-1)  # vecdot is in 16 bits under autocast
        dh = scale(dh, before)
    elif weighting == "none":
        dw_rows.zero_()
    d_down = weight_gradient(dy_rows, wa, offsets, down.dtype) if need_down else down.new_empty(0)
    del dy_rows, wa
    d_weight = torch.empty(weight.numel(), dtype=torch.float32, device=x.device)
    d_weight[order] = dw_rows
    d_gate_up, d_x = gate_up.new_empty(0), x.new_empty(0)
    if need_gate_up:
        d_gate_up = weight_gradient(dh, x.index_select(0, token), offsets, gate_up.dtype)
    if need_x:
        d_x = sum_slots(_product(dh, gate_up, offsets, null_experts), place, top_k, "torch")
    return d_x, d_gate_up, d_down, d_weight.view_as(weight).to(weight.dtype)


def _product(rows: Tensor, matrices: Tensor, offsets: Tensor, null_experts: int) -> Tensor:
    """Of every expert's rows; 0 in those of null experts."""
    y = product(rows, matrices, offsets)
    return clear_nulls(y, offsets) if null_experts else y


def weights_of(weight: Tensor, choice: Tensor, weighting: str) -> tuple[Tensor | None, Tensor]:
    """(of the input of each row or None, of its output), fp32 (R,) each, of the choices (R,) the rows are of."""
    rows = weight.float().flatten().index_select(0, choice)
    return (None, rows) if weighting == "after" else (rows if weighting == "before" else None, torch.ones_like(rows))


def scale(h: Tensor, weight: Tensor) -> Tensor:
    """Each row times its weight, in fp32 and rounded once."""
    return torch.mul(h, weight.unsqueeze(1), out=torch.empty_like(h))
