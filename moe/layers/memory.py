"""What one attention layer is handed of a decoding cache."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Memory"]


class Memory(NamedTuple):
    """Room for M tokens, `start` of them filled. The layer writes its S new tokens behind those and attends to all.

    store: latent attention (B, M, C + R): latents after their norm, then rotated shared keys;
           grouped-query attention (2, B, heads, M, d): rotated keys, values.
    """

    store: Tensor
    start: int
