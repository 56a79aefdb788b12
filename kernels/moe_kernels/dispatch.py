# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Sort the R = T*K (token, slot) pairs by expert, stably: rows of one expert stay in token order.

    order_R      int32   order[r] = t*K + k: which flattened slot sorted row r came from; R < 2**31
    token_R      int32   token[r] = order[r] // K: whose activations row r reads
    place_R      int32   place[t*K + k] = r: the inverse of order
    offsets_E1   int32   rows offsets[e] .. offsets[e+1] belong to expert e; offsets[0] = 0, offsets[E] = R

Example: T = 2, K = 2, E = 3, topk_index = [[2, 0], [0, 2]] -> order 1 2 0 3, token 0 1 0 1, place 2 0 1 3,
offsets 0 2 2 4.

A counting sort in three launches (and a memset where the counts are not given): how many rows of each block of B rows
chose each expert; where each block's first row of each expert goes; every row to its place. Nothing waits for the host,
and nothing depends on the order in which blocks run.

Bytes: index read twice, 16 R; the histogram (R/B, E) written, read, written and gathered from, 16 R E/B; order and
place, 8 R. At T = 32768, K = 8, E = B = 128 that is 10.5 MB, 2.4 us at 4.3 TB/s. Ranks within blocks are R B = 34 M
comparisons, some 6 us on an H200; the scan is four dependent steps of about 1 us; launches take 3 us each. So about
20 us predicted, where 5 % of the layer's products (6 T K D F / 780 TFLOP/s, D = 2048, F = 768) are 160 us. A sort or a
running one-hot count of the block (R E steps, four times as many at E = 512) would not be cheaper than comparing.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._triton import tl, triton
from .agreement import Check, E, K, Side, T
from .backend import register_check, resolve
from .errors import KernelError
from .launching import launch

__all__ = ["Dispatch", "sort_by_expert"]


class Dispatch(NamedTuple):
    """What `sort_by_expert` returns; the index arrays are described at the top of the file."""

    order_R: Tensor
    token_R: Tensor
    place_R: Tensor
    offsets_E1: Tensor


def sort_by_expert(
    topk_index_TK: Tensor, n_experts: int, *, tokens_per_expert: Tensor | None = None, backend: str | None = None
) -> Dispatch:
    """Stable counting sort of the chosen experts, without host synchronisation.

    topk_index_TK: integers in [0, n_experts). tokens_per_expert: their counts when the router has them already.
    """
    if topk_index_TK.dim() != 2:
        raise KernelError(f"topk_index_TK has {topk_index_TK.dim()} dimensions: give (tokens, top_k)")
    backend = resolve(backend, topk_index_TK.device, "sort_by_expert")
    order, place, offsets = _sort_by_expert(topk_index_TK, n_experts, tokens_per_expert, backend)
    return Dispatch(order, order // max(topk_index_TK.shape[1], 1), place, offsets)


# torch reference


def _sort_torch(index: Tensor, n_experts: int, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    flat = index.flatten()
    keys = flat.to(torch.int16) if n_experts <= 2**15 else flat
    if keys.device.type == "cpu":  # numpy sorts two bytes by radix: 12k rows in 0.03 ms where torch takes 0.38
        order = torch.from_numpy(np.argsort(keys.numpy(), kind="stable")).to(torch.int32)
    else:
        order = keys.argsort(stable=True).to(torch.int32)
    if counts is None:
        counts = torch.zeros(n_experts, dtype=torch.int32, device=index.device)
        counts.scatter_add_(0, flat.long(), torch.ones(flat.numel(), dtype=torch.int32, device=index.device))
    offsets = torch.zeros(n_experts + 1, dtype=torch.int32, device=index.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return order, place, offsets


# kernels


@triton.jit
def expert_histogram_kernel(
    p_index, p_hist, p_counts, n_rows, n_experts, COUNT: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr
):
    """hist[block, e] = how many of the block's BR rows chose expert e; with COUNT also added to counts[e]."""
    block = tl.program_id(0)
    o_row = block * BR + tl.arange(0, BR)
    m_row = o_row < n_rows
    expert = tl.load(p_index + o_row, mask=m_row, other=n_experts).to(tl.int32)
    o_e = tl.arange(0, BE)  # BE > n_experts: rows past the end are counted in a bin that is not stored
    hist = tl.histogram(expert, BE)
    tl.store(p_hist + block.to(tl.int64) * n_experts + o_e, hist, mask=o_e < n_experts)
    if COUNT:
        tl.atomic_add(p_counts + o_e, hist, mask=(o_e < n_experts) & (hist > 0), sem="relaxed")


@triton.jit
def scan_histogram_kernel(
    p_hist, p_counts, p_offsets, n_blocks, n_experts, BN: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr
):
    """hist[block, e] becomes the row where the block's first row of expert e goes; BC experts per program.

    Example: BC = 2, hist 1 1 | 0 2 | 1 0, counts 2 3 -> offsets 0 2 5, hist 0 2 | 1 3 | 1 5.
    """
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_e = tl.arange(0, BE)
    count = tl.load(p_counts + o_e, mask=o_e < n_experts, other=0).to(tl.int32)
    base = tl.sum(tl.where(o_e[None, :] < o_c[:, None], count[None, :], 0), 1)
    tl.store(p_offsets + o_c, base, mask=o_c <= n_experts)
    for first in range(0, n_blocks, BN):
        o_n = first + tl.arange(0, BN)
        live = (o_n < n_blocks)[:, None] & (o_c < n_experts)[None, :]
        p_tile = p_hist + o_n.to(tl.int64)[:, None] * n_experts + o_c[None, :]
        hist = tl.load(p_tile, mask=live, other=0)
        tl.store(p_tile, base[None, :] + tl.cumsum(hist, 0) - hist, mask=live)
        base += tl.sum(hist, 0)


@triton.jit
def scatter_rows_kernel(p_index, p_base, p_order, p_place, n_rows, n_experts, BR: tl.constexpr):
    """place[row] = base[block, e] + rank and order[place[row]] = row, where e is the row's expert and rank the number
    of earlier rows of the block with the same expert.

    Example: BR = 4, one block, experts 2 0 0 2, base 0 2 2 -> ranks 0 0 1 1, places 2 0 1 3, order 1 2 0 3.
    """
    block = tl.program_id(0)
    o_row = block * BR + tl.arange(0, BR)
    o_other = block * BR + tl.arange(0, BR)
    m_row = o_row < n_rows
    expert = tl.load(p_index + o_row, mask=m_row, other=0).to(tl.int32)
    other = tl.load(p_index + o_other, mask=o_other < n_rows, other=-1).to(tl.int32)
    earlier = (other[None, :] == expert[:, None]) & (o_other[None, :] < o_row[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    base = tl.load(p_base + block.to(tl.int64) * n_experts + expert, mask=m_row, other=0)
    tl.store(p_order + base + rank, o_row, mask=m_row)
    tl.store(p_place + o_row, base + rank, mask=m_row)


# launcher

SORT_BLOCK = 128  # rows per program: ranks compare them pairwise
SCAN_TILE = (512, 8)  # blocks and experts a program of the scan takes at once: 32 bytes of a row, a sector


def _sort_triton(index: Tensor, n_experts: int, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    flat = index.contiguous().view(-1)
    n_rows = flat.numel()
    n_blocks = triton.cdiv(n_rows, SORT_BLOCK)
    block_n, block_c = SCAN_TILE
    block_e = triton.next_power_of_2(n_experts + 1)
    total = torch.zeros(n_experts, dtype=torch.int32, device=index.device) if counts is None else counts.contiguous()
    hist = torch.empty(n_blocks, n_experts, dtype=torch.int32, device=index.device)
    offsets = torch.empty(n_experts + 1, dtype=torch.int32, device=index.device)
    order, place = (torch.empty(n_rows, dtype=torch.int32, device=index.device) for _ in range(2))
    if n_rows:
        launch(
            expert_histogram_kernel, (n_blocks,), flat, hist, total, n_rows, n_experts,
            COUNT=counts is None, BR=SORT_BLOCK, BE=block_e, num_warps=4,
        )  # fmt: skip
    launch(
        scan_histogram_kernel, (triton.cdiv(n_experts + 1, block_c),), hist, total, offsets, n_blocks, n_experts,
        BN=block_n, BC=block_c, BE=block_e, num_warps=4,
    )  # fmt: skip
    if n_rows:
        args = (flat, hist, order, place, n_rows, n_experts)
        launch(scatter_rows_kernel, (n_blocks,), *args, BR=SORT_BLOCK, num_warps=4)
    return order, place, offsets


# library op


def sort_rows(index: Tensor, n_experts: int, counts: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(order_R, place_R, offsets_E1) by the given backend; what the library ops of this package are built from."""
    run = _sort_triton if backend == "triton" else _sort_torch
    return run(index, n_experts, counts)


@torch.library.custom_op("moe_kernels::sort_by_expert", mutates_args=())
def _sort_by_expert(
    index: Tensor, n_experts: int, counts: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return sort_rows(index, n_experts, counts, backend)


@_sort_by_expert.register_fake
def _(index: Tensor, n_experts: int, counts: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        index.new_empty((index.numel(),), dtype=torch.int32),
        index.new_empty((index.numel(),), dtype=torch.int32),
        index.new_empty((n_experts + 1,), dtype=torch.int32),
    )


# self-check


def _probe(side: Side) -> dict[str, Tensor]:
    """Two blocks of rows; the last two experts stay empty. Rows are counted here, or by the router."""
    index = torch.randint(E - 2, (2 * T, K), generator=torch.Generator().manual_seed(0))
    found: dict[str, Tensor] = {}
    for case, counts in (("counted", None), ("counts given", index.flatten().bincount(minlength=E).int())):
        given = None if counts is None else counts.to(side.device)
        results = _sort_by_expert(index.to(side.device), E, given, side.backend)
        found |= {f"{name} ({case})": t for name, t in zip(("order", "place", "offsets"), results, strict=True)}
    return found


register_check(Check("sort_by_expert", _probe, {torch.float32: 0.0}))
