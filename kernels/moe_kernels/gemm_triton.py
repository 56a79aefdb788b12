"""The grouped products by Triton: which kernel is launched how. Letters are those of `gemm.py`."""

from typing import Any

import torch
from torch import Tensor

from ._triton import triton
from .configs import Config, config_for, n_programs
from .grouped_kernels import product_kernel, wgrad_kernel
from .launching import launch
from .tiles import GROUP, TileSchedule

__all__ = ["as_it_lies", "product", "row_tile_options", "unit_of", "wgrad"]


def unit_of(*tensors: Tensor) -> int:
    """Elements in 16 bytes where these contiguous tensors, of one dtype, have rows of whole 16 bytes at addresses
    divisible by 16, as TMA and vector loads want; else 1. To be asked of tensors that show every width of a launch."""
    aligned = all(not t.shape[-1] * t.element_size() % 16 and not t.data_ptr() % 16 for t in tensors)
    return 16 // tensors[0].element_size() if aligned else 1


def as_it_lies(w: Tensor, transposed: bool) -> tuple[Tensor, bool]:
    """(w in the order of its memory, whether a product's inputs come last there); a copy only if that is no order.

    The product is with w[e].T of w (E, O, I), whose inputs are I, or when transposed with w[e], whose inputs are O.
    """
    if w.transpose(1, 2).is_contiguous() and not w.is_contiguous():
        return w.transpose(1, 2), transposed
    return w.contiguous(), not transposed


def row_tile_options(config: Config, unit: int, n_in: int, inputs_last: bool) -> dict[str, Any]:
    """Compile-time arguments that all products of rows with weights have."""
    return {
        "UNIT": unit,
        "BM": config.rows,
        "BN": config.cols,
        "BK": config.step,
        "GROUP": GROUP,
        "EVEN": n_in % config.step == 0,
        "INPUTS_LAST": inputs_last,
        "TMA": config.tma,
        "PRECISION": config.precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def product(x: Tensor, w: Tensor, tiles: TileSchedule, transposed: bool) -> Tensor:
    """x @ w[e].T for w (E, O, I), or x @ w[e] when transposed; x contiguous, w in the same dtype.

    Rows behind the last group hold anything: no program writes them.
    """
    n_experts, n_out, n_in = w.shape
    if transposed:
        n_out, n_in = n_in, n_out
    y = x.new_empty(len(x), n_out)
    if y.numel() == 0:
        return y
    w, inputs_last = as_it_lies(w, transposed)
    unit = unit_of(x, w, y)
    config = config_for("product", x.dtype, x.device, tiles.block, unit > 1)
    work = len(tiles.tiles_N3) * triton.cdiv(n_out, config.cols)
    args = (x, w, y, tiles.tiles_N3, tiles.count_1, len(x), n_experts, n_in, n_out)
    options = row_tile_options(config, unit, n_in, inputs_last) | {
        "FLATTEN": config.flatten,
        "SPECIALIZE": config.specialize,
    }
    launch(product_kernel, (n_programs(config, x.device, work),), *args, **options)
    return y


def wgrad(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    block: int,
    order: Tensor | None = None,
    top_k: int = 1,
    gather: str = "",
) -> Tensor:
    """dw (E, O, I) in `out_dtype` of contiguous dy (R, O) and x (R, I); `block` as the other products of the pass.

    gather: "dy" or "x", the one that has a row per token, which row r reads at order[r] // top_k.
    """
    n_experts, n_out, n_in = offsets.numel() - 1, dy.shape[1], x.shape[1]
    dw = torch.empty(n_experts, n_out, n_in, dtype=out_dtype, device=x.device)
    if dw.numel() == 0 or len(x) == 0 or len(dy) == 0:
        return dw.zero_()
    n_rows = len(x if gather == "dy" else dy)
    unit = unit_of(dy, x)
    config = config_for("wgrad_gathered" if gather else "wgrad", x.dtype, x.device, block, unit > 1)
    work = n_experts * triton.cdiv(n_out, config.rows) * triton.cdiv(n_in, config.cols)
    args = (dy, x, order, dw, offsets, n_rows, n_experts, n_out, n_in)
    options = {
        "TOP_K": top_k,
        "UNIT": unit,
        "BO": config.rows,
        "BI": config.cols,
        "BR": config.step,
        "GROUP": GROUP,
        "GATHER_DY": gather == "dy",
        "GATHER_X": gather == "x",
        "TMA": config.tma,
        "PRECISION": config.precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    launch(wgrad_kernel, (n_programs(config, x.device, work),), *args, **options)
    return dw
