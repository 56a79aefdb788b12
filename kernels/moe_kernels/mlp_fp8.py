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

from torch import Tensor

from .combine import end_of_rows, sum_slots
from .fp8_gemm import product, starts_of, swiglu_gradient, swiglu_quantised, wgrad
from .quantise import TILE, quantise_columns, quantise_rows, quantise_weight
from .tiles import TileSchedule, schedule_tiles, schedule_tiles_torch

__all__ = ["backward", "forward"]


def _tiles(offsets: Tensor, n_rows: int, backend: str) -> TileSchedule:
    run = schedule_tiles if backend == "triton" else schedule_tiles_torch
    return run(offsets, n_rows, TILE)


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    null_experts: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y, h); h is empty unless `keep`, and holds anything in the rows of null experts."""
    top_k = weight.shape[1]
    tiles = _tiles(offsets, len(order), backend)
    x8 = quantise_rows(x.contiguous(), backend)
    w8 = quantise_weight(gate_up.contiguous(), False, backend)
    h = product(x8, w8, tiles, offsets, x.dtype, backend, order, top_k)
    del x8, w8
    a8 = swiglu_quantised(h, order, weight.float().flatten(), offsets[-1:], backend)
    if not keep:
        h = h.new_empty(0)
    out = product(a8, quantise_weight(down.contiguous(), False, backend), tiles, offsets, x.dtype, backend)
    return sum_slots(out, place, top_k, backend, end_of_rows(offsets, null_experts)), h


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
    dh, wa, d_weight = swiglu_gradient(q, h, order, weight.float().flatten(), offsets[-1:], backend)
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
