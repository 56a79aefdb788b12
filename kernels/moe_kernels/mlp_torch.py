"""The expert MLP in torch: grouped products and activation one after the other, the reference of `mlp_triton.py`."""

import torch
from torch import Tensor

from .combine import end_of_rows, sum_slots
from .gemm import gemm_dgrad, gemm_forward, gemm_wgrad
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
    rows = x.index_select(0, order // top_k)
    h = _clear_nulls(gemm_forward(rows, gate_up, offsets, "torch"), offsets, null_experts)
    del rows
    before, after = _weights(weight, order, weighting)
    wa = swiglu_forward(h if before is None else _scale(h, before), after)
    out = gemm_forward(wa, down, offsets, "torch")
    y = sum_slots(out, place, top_k, "torch", end_of_rows(offsets, null_experts))
    return y, h if keep else h.new_empty(0)


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
    q = _clear_nulls(gemm_dgrad(dy_rows, down, offsets, "torch"), offsets, null_experts)
    before, after = _weights(weight, order, weighting)
    dh, wa, dw_rows = swiglu_backward(q, h if before is None else _scale(h, before), after)
    del q
    if before is not None:
        dw_rows = torch.linalg.vecdot(dh.float(), h.float())
        dh = _scale(dh, before)
    elif weighting == "none":
        dw_rows.zero_()
    d_down = gemm_wgrad(dy_rows, wa, offsets, down.dtype, "torch") if need_down else down.new_empty(0)
    del dy_rows, wa
    d_weight = torch.empty(weight.numel(), dtype=torch.float32, device=x.device)
    d_weight[order] = dw_rows
    d_gate_up = gate_up.new_empty(0)
    if need_gate_up:
        d_gate_up = gemm_wgrad(dh, x.index_select(0, token), offsets, gate_up.dtype, "torch")
    d_x = x.new_empty(0)
    if need_x:
        d_rows = gemm_dgrad(dh, gate_up, offsets, "torch")
        d_x = sum_slots(d_rows, place, top_k, "torch", end_of_rows(offsets, null_experts))
    return d_x, d_gate_up, d_down, d_weight.view_as(weight).to(weight.dtype)


def _weights(weight: Tensor, order: Tensor, weighting: str) -> tuple[Tensor | None, Tensor]:
    """(of the row's input or None, of its output), fp32 (R,) each."""
    rows = weight.float().flatten().index_select(0, order)
    return (None, rows) if weighting == "after" else (rows if weighting == "before" else None, torch.ones_like(rows))


def _scale(h: Tensor, weight: Tensor) -> Tensor:
    """Each row times its weight, in fp32 and rounded once."""
    return torch.mul(h, weight.unsqueeze(1), out=torch.empty_like(h))


def _clear_nulls(rows: Tensor, offsets: Tensor, null_experts: int) -> Tensor:
    """`rows` with those behind the last group set to 0: no product has written them. In place; no sync on CUDA."""
    if null_experts and rows.device.type == "cpu":
        rows[int(offsets[-1]) :] = 0
    elif null_experts:
        rows.masked_fill_((torch.arange(len(rows), device=rows.device) >= offsets[-1]).unsqueeze(1), 0)
    return rows
