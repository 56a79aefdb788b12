"""Sort the R = T*K (token, slot) pairs by expert, stably: rows of one expert stay in token order.

    order_R      int64   order[r] = t*K + k: which flattened slot sorted row r came from
    token_R      int64   token[r] = order[r] // K: whose activations row r reads
    offsets_E1   int32   rows offsets[e] .. offsets[e+1] belong to expert e; offsets[0] = 0, offsets[E] = R

Example: T = 2, K = 2, E = 3, topk_index = [[2, 0], [0, 2]] -> order 1 2 0 3, token 0 1 0 1, offsets 0 2 2 4.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import resolve
from .errors import KernelError

__all__ = ["Dispatch", "sort_by_expert"]


class Dispatch(NamedTuple):
    """What `sort_by_expert` returns; the index arrays are described at the top of the file."""

    order_R: Tensor
    token_R: Tensor
    offsets_E1: Tensor


def sort_by_expert(
    topk_index_TK: Tensor, n_experts: int, *, tokens_per_expert: Tensor | None = None, backend: str | None = None
) -> Dispatch:
    """Stable counting sort of the chosen experts, without host synchronisation.

    topk_index_TK: integers in [0, n_experts). tokens_per_expert: their counts when the router has them already.
    """
    if topk_index_TK.dim() != 2:
        raise KernelError(f"topk_index_TK has {topk_index_TK.dim()} dimensions: give (tokens, top_k)")
    backend = resolve(backend, topk_index_TK.device)
    order, offsets = _sort_by_expert(topk_index_TK, n_experts, tokens_per_expert, backend)
    return Dispatch(order, order // max(topk_index_TK.shape[1], 1), offsets)


# torch reference


def _sort_torch(index: Tensor, n_experts: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = index.flatten()
    # Two-byte keys sort in 0.7 ms where eight-byte ones take 1.7 ms (262k rows, CPU).
    keys = flat.to(torch.int16) if n_experts <= 2**15 else flat
    order = keys.argsort(stable=True)
    if counts is None:
        counts = torch.zeros(n_experts, dtype=torch.int32, device=index.device)
        counts.scatter_add_(0, flat.long(), torch.ones(flat.numel(), dtype=torch.int32, device=index.device))
    offsets = torch.zeros(n_experts + 1, dtype=torch.int32, device=index.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    return order, offsets


# library op


def sort_rows(index: Tensor, n_experts: int, counts: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """(order_R, offsets_E1) by the given backend; what the library ops of this package are built from."""
    return _sort_torch(index, n_experts, counts)


@torch.library.custom_op("moe_kernels::sort_by_expert", mutates_args=())
def _sort_by_expert(index: Tensor, n_experts: int, counts: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return sort_rows(index, n_experts, counts, backend)


@_sort_by_expert.register_fake
def _(index: Tensor, n_experts: int, counts: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return (
        index.new_empty((index.numel(),), dtype=torch.int64),
        index.new_empty((n_experts + 1,), dtype=torch.int32),
    )
