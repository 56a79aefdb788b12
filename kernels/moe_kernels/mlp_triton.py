"""The expert MLP by Triton: three launches forward, five backward, and the sums over a token's rows.

    forward    tiles -> h, wa = x[token] @ gate_up.T, activation  ->  o = wa @ down.T  ->  y = sum of o
    backward   tiles -> dh, wa, dw = dy[token] @ down, activation's gradient
               ddown = dy[token].T wa,   dgate_up = dh.T x[token],   dx = sum of (dh @ gate_up)

No row is permuted: what is read by token is gathered inside the products (`mlp_kernels.py`). No atomics: every sum has
one order, so equal inputs give equal bits. The host reads nothing from the device.
"""

import torch
from torch import Tensor

from ._triton import triton
from .combine import end_of_rows, sum_slots
from .configs import config_for, n_programs, row_block
from .gemm_triton import as_it_lies, product, row_tile_options, unit_of, wgrad
from .launching import launch
from .mlp_kernels import swiglu_backward_kernel, swiglu_kernel
from .tiles import TileSchedule, schedule_tiles

__all__ = ["backward", "forward", "swiglu_backward_product", "swiglu_product"]


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
    """(y, h); h is empty unless `keep`, and holds anything in the rows of null experts."""
    n_experts, top_k = gate_up.shape[0], weight.shape[1]
    tiles = schedule_tiles(offsets, len(order), row_block(x.dtype, len(order), n_experts))
    h, wa = swiglu_product(x.contiguous(), gate_up.to(x.dtype), order, _flat(weight), tiles, weighting, keep)
    out = product(wa, down.to(x.dtype), tiles, False)
    return sum_slots(out, place, top_k, "triton", end_of_rows(offsets, null_experts)), h


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
    n_experts, top_k = gate_up.shape[0], weight.shape[1]
    x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
    tiles = schedule_tiles(offsets, len(order), row_block(x.dtype, len(order), n_experts))
    end = end_of_rows(offsets, null_experts)
    dh, wa, d_weight = swiglu_backward_product(dy, down.to(x.dtype), order, _flat(weight), h, tiles, weighting)
    if end is not None:
        d_weight.masked_fill_(place >= end, 0)  # of slots that no program writes
    d_x, d_gate_up, d_down = x.new_empty(0), gate_up.new_empty(0), down.new_empty(0)
    if need_down:
        d_down = wgrad(dy, wa, offsets, down.dtype, tiles.block, order, top_k, "dy")
    del wa
    if need_gate_up:
        d_gate_up = wgrad(dh, x, offsets, gate_up.dtype, tiles.block, order, top_k, "x")
    if need_x:
        d_rows = product(dh, gate_up.to(x.dtype), tiles, True)
        d_x = sum_slots(d_rows, place, top_k, "triton", end)
    return d_x, d_gate_up, d_down, d_weight.view_as(weight).to(weight.dtype)


def _flat(weight: Tensor) -> Tensor:
    return weight.float().contiguous()


# launchers


def swiglu_product(
    x: Tensor, gate_up: Tensor, order: Tensor, weight: Tensor, tiles: TileSchedule, weighting: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """h (R, 2F), empty unless `keep`, and wa (R, F) of x (T, D), gate_up (E, 2F, D) and weight (T, K) fp32."""
    n_experts, hidden, width = gate_up.shape[0], gate_up.shape[1] // 2, x.shape[1]
    h, wa = x.new_empty((len(order), 2 * hidden) if keep else 0), x.new_empty(len(order), hidden)
    if wa.numel() == 0:
        return h, wa
    gate_up, inputs_last = as_it_lies(gate_up, False)
    unit = unit_of(x, gate_up, wa)
    config = config_for("swiglu", x.dtype, x.device, tiles.block, unit > 1)
    work = len(tiles.tiles_N3) * triton.cdiv(hidden, config.cols)
    args = (x, gate_up, order, weight, h, wa, tiles.tiles_N3, tiles.count_1, n_experts, width, hidden)
    options = row_tile_options(config, unit, width, inputs_last) | {
        "TOP_K": weight.shape[1],
        "WEIGHTING": weighting,
        "KEEP": keep,
    }
    launch(swiglu_kernel, (n_programs(config, x.device, work),), *args, **options)
    return h, wa


def swiglu_backward_product(
    dy: Tensor,
    down: Tensor,
    order: Tensor,
    weight: Tensor,
    h: Tensor,
    tiles: TileSchedule,
    weighting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh (R, 2F), wa (R, F) and dweight (T*K,) fp32 of dy (T, D), down (E, D, F), weight (T, K) fp32 and h (R, 2F).

    dweight holds anything for the slots of null experts.
    """
    n_experts, width, hidden = down.shape
    down, inputs_last = as_it_lies(down, True)
    dh, wa = torch.empty_like(h), h.new_empty(len(h), hidden)
    unit = unit_of(dy, down, wa)
    config = config_for("swiglu_backward", dy.dtype, dy.device, tiles.block, unit > 1)
    n_parts = triton.cdiv(hidden, config.cols)
    allot = torch.zeros if weighting == "none" else torch.empty  # which writes none
    parts = allot(len(order), n_parts, dtype=torch.float32, device=dy.device)
    if wa.numel():
        work = len(tiles.tiles_N3) * n_parts
        args = (dy, down, order, weight, h, dh, wa, parts, tiles.tiles_N3, tiles.count_1, n_experts, width, hidden)
        options = row_tile_options(config, unit, width, inputs_last) | {
            "TOP_K": weight.shape[1],
            "WEIGHTING": weighting,
        }
        launch(swiglu_backward_kernel, (n_programs(config, dy.device, work),), *args, **options)
    return dh, wa, parts.sum(1)
