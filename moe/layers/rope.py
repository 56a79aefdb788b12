"""Rotary position embedding (Su et al., arXiv:2104.09864).

A pair of coordinates (a, b) of a query or key at position p is turned by the angle p * theta^(-2i/d), i the pair's
number, so that the product of a query and a key depends on their distance alone. Two layouts of the pairs exist:
neighbours (0,1), (2,3), … (DeepSeek; `interleaved=True`) and halves (0,d/2), (1,d/2+1), … (Llama).
"""

import torch
from torch import Tensor

__all__ = ["Rotary", "apply_rotary", "rotary_tables"]

Rotary = tuple[Tensor, Tensor]


def rotary_tables(position_ids: Tensor, dim: int, theta: float) -> Rotary:
    """Cosines and sines, each (*position_ids.shape, dim / 2) in fp32, for integer positions and an even `dim`."""
    inverse = theta ** (-torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim)
    angles = position_ids.to(torch.float32).unsqueeze(-1) * inverse
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotary: Rotary, *, interleaved: bool) -> Tensor:
    """Turn the pairs of `x`, shape (B, H, S, d), by tables of shape (B or 1, S, d / 2); computed in fp32.

    Interleaved input comes out with the pairs' first coordinates in the first half: queries and keys are permuted
    alike, so their products are unchanged.
    """
    cos, sin = (table.unsqueeze(-3) for table in rotary)
    wide = x.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
