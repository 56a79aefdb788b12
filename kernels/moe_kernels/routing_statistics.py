"""Sums over routed tokens that balancing needs: what they are, and the torch reference of each.

    load_e          rows of expert e
    margin_te       alpha_t - (s_te + expert_bias_e), where alpha_t is the (K+1)-th largest of s_t + expert_bias
    margins_em      tokens whose margin to expert e lies in bin m
    preferred_be    tokens of sequence b whose K largest *unbiased* scores include e, whatever groups and bias choose
    shares_be       sum over the tokens of sequence b of s_te / (sum_j s_tj + 1e-20), the normalised score

`counted` (T,) bool leaves out tokens that are padding. The T tokens are B sequences of equal length, one after another.
The same at every run: the kernel adds integers, whatever their order. Of scores that are NaN nothing is said but that
every index lies in range. Letters: T tokens, B sequences, E experts, K top-k, M bins.

Example: scores .6 .3 .1 of one token, no bias, K = 1 -> preferred 1 0 0, shares .6 .3 .1, margins -.3 0 .2.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "EPS",
    "MARGIN_BINS",
    "MARGIN_REACH",
    "MARGIN_WIDTH",
    "count_load",
    "margin_histogram",
    "select",
    "sequence_preferred",
    "sequence_shares",
]

EPS = 1e-20

# Margins lie in bins that are even in asinh(margin / width): fine where a balanced expert's quantile lies, near 0, and
# of constant relative width away from it. So one set of bins suits sigmoid scores and softmax's much smaller ones.
MARGIN_BINS, MARGIN_WIDTH, _LARGEST = 256, 1e-3, 8.0
MARGIN_REACH = math.asinh(_LARGEST / MARGIN_WIDTH)


def select(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, descending, ties to the lowest index.

    torch.topk leaves the order of ties open. On CPU only the rows with equal neighbours among the first k+1 are done
    again with unique keys (32k x 256, k = 8: 41 ms against 135 ms for unique keys throughout and 200 ms for a stable
    sort); elsewhere all rows are, because finding such rows would synchronise.
    """
    if values.device.type != "cpu":
        return _select_unique(values, k)
    largest, index = values.topk(min(k + 1, values.shape[1]), dim=-1)
    tied = (largest[:, 1:] == largest[:, :-1]).any(-1).nonzero().squeeze(-1)
    index = index[:, :k].contiguous()
    if tied.numel():
        index[tied] = _select_unique(values[tied], k)
    return index


def _select_unique(values: Tensor, k: int) -> Tensor:
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes one zero of the two
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as the floats do
    reverse = torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    key = (ordered.to(torch.int64) << 32) | reverse
    return values.shape[1] - 1 - (key.topk(k, dim=-1).values & 0xFFFFFFFF)


def count_load(index: Tensor, n_experts: int, counted: Tensor | None = None) -> Tensor:
    """Rows of each expert, (E,) int32, from the choices (T, K)."""
    rows = torch.ones_like(index, dtype=torch.int32)
    if counted is not None:
        rows = rows * counted.unsqueeze(1)
    load = torch.zeros(n_experts, dtype=torch.int32, device=index.device)
    return load.scatter_add_(0, index.flatten(), rows.flatten())


def margin_histogram(selection: Tensor, top_k: int, counted: Tensor | None = None) -> Tensor:
    """(E, M) int32: tokens by bin of their margin, from what selection sees (T, E). No host sync on CUDA."""
    n_experts = selection.shape[1]
    margin = selection.topk(top_k + 1, dim=1).values[:, -1:] - selection
    position = (torch.asinh(margin / MARGIN_WIDTH) / MARGIN_REACH + 1) * (MARGIN_BINS / 2)
    first_E = torch.arange(n_experts, device=selection.device) * MARGIN_BINS
    place = position.long().clamp_(0, MARGIN_BINS - 1) + first_E
    return count_load(place, n_experts * MARGIN_BINS, counted).view(n_experts, MARGIN_BINS)


def sequence_preferred(index: Tensor, n_experts: int, sequences: int, counted: Tensor | None = None) -> Tensor:
    """(B, E) int32: tokens of each sequence that prefer the expert, from the K largest unbiased scores (T, K)."""
    sequence_T = torch.arange(len(index), device=index.device) // max(len(index) // sequences, 1)
    place = sequence_T.unsqueeze(1) * n_experts + index
    return count_load(place, sequences * n_experts, counted).view(sequences, n_experts)


def sequence_shares(scores: Tensor, sequences: int, counted: Tensor | None = None) -> Tensor:
    """(B, E) fp32: sum of the normalised scores of each sequence; differentiable."""
    shares = scores / (scores.sum(-1, keepdim=True) + EPS)
    if counted is not None:
        shares = shares * counted.unsqueeze(1)
    return shares.unflatten(0, (sequences, len(scores) // sequences)).sum(1)
