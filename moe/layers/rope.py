"""Rotary position embedding (arXiv:2104.09864), and three ways to stretch it over longer contexts.

A pair of coordinates (a, b) of a query or key at position p is turned by the angle p * theta^(-2i/d), i the pair's
number, so that the product of a query and a key depends on their distance alone. Two layouts of the pairs exist:
neighbours (0,1), (2,3), … (DeepSeek; `interleaved=True`) and halves (0,d/2), (1,d/2+1), … (Llama).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["STRETCHINGS", "Llama3", "Rotary", "Stretching", "Yarn", "apply_rotary", "rotary_tables"]

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Stretching:
    """Stretches the positions a model was trained on by `factor`: pairs are slowed down by it, here all of them alike.

    This is linear interpolation (arXiv:2306.15595). The other kinds leave alone the pairs that turn often, which tell
    near positions apart, and differ in which these are.
    """

    factor: float

    @property
    def table_scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    @property
    def softmax_scale(self) -> float:
        """What latent attention's softmax scale is multiplied by."""
        return 1.0

    def slow_down(self, inverse: Tensor, dim: int, theta: float) -> Tensor:
        """The frequencies of `dim` / 2 pairs, in radians a position, after stretching."""
        slowed = self._slowed(inverse, dim, theta)
        return inverse / self.factor * slowed + inverse * (1 - slowed)

    def _slowed(self, inverse: Tensor, dim: int, theta: float) -> Tensor:
        """How far each pair is slowed down: 1 by all of `factor`, 0 not at all."""
        return torch.ones_like(inverse)


@dataclass(frozen=True, kw_only=True)
class Llama3(Stretching):
    """Llama 3.1's, as in transformers' `rope_type` llama3.

    Pairs that turn less than `low_freq_factor` times within `original_max_position_embeddings` are slowed down fully,
    those that turn more than `high_freq_factor` times keep their frequency, and those between are blended linearly in
    how often they turn.
    """

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def _slowed(self, inverse: Tensor, dim: int, theta: float) -> Tensor:
        turns = self.original_max_position_embeddings * inverse / (2 * math.pi)
        return ((self.high_freq_factor - turns) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Yarn(Stretching):
    """YaRN (arXiv:2309.00071), as DeepSeek uses it.

    Pairs that turn more than `beta_fast` times within `original_max_position_embeddings` keep their frequency, those
    that turn less than `beta_slow` times are slowed down fully, and those between are blended linearly in the pair's
    number. Attention grows flatter over more positions; 0.1 * m * ln(factor) + 1 sharpens it again, with m = `mscale`
    on the tables over the same with `mscale_all_dim`, and DeepSeek's softmax scale takes the square of the latter.
    """

    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def table_scale(self) -> float:
        """What cosines and sines are multiplied by; m = 1 where no two scales are given."""
        if self.mscale and self.mscale_all_dim:
            return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)
        return self._sharpening(1.0)

    @property
    def softmax_scale(self) -> float:
        """What latent attention's softmax scale is multiplied by (DeepSeek-V2 and V3)."""
        return self._sharpening(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _slowed(self, inverse: Tensor, dim: int, theta: float) -> Tensor:
        low = max(math.floor(self._pair_turning(self.beta_fast, dim, theta)), 0)
        high = min(math.ceil(self._pair_turning(self.beta_slow, dim, theta)), dim - 1)
        pairs = torch.arange(dim // 2, device=inverse.device, dtype=torch.float32)
        return ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)

    def _pair_turning(self, turns: float, dim: int, theta: float) -> float:
        """Number of the pair that turns `turns` times within the original context."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def _sharpening(self, m: float) -> float:
        return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


# By their names in Hugging Face's `rope_type`; their fields have its names as well.
STRETCHINGS: dict[str, type[Stretching]] = {"linear": Stretching, "llama3": Llama3, "yarn": Yarn}


def rotary_tables(position_ids: Tensor, dim: int, theta: float, stretching: Stretching | None = None) -> Rotary:
    """Cosines and sines, each (*position_ids.shape, dim / 2) in fp32, for integer positions and an even `dim`."""
    inverse = theta ** (-torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim)
    scale = 1.0
    if stretching is not None:
        inverse, scale = stretching.slow_down(inverse, dim, theta), stretching.table_scale
    angles = position_ids.to(torch.float32).unsqueeze(-1) * inverse
    return angles.cos() * scale, angles.sin() * scale


def apply_rotary(x: Tensor, rotary: Rotary, *, interleaved: bool) -> Tensor:
    """Turn pairs of `x`, shape (B, S, H, W), by tables of shape (B or 1, S, d / 2); computed in fp32.

    The pairs are those of the last d coordinates; what comes before, where W > d, has no position and stays as it is.
    Interleaved input comes out with the pairs' first coordinates in front of their second: queries and keys are
    permuted alike, so their products are unchanged. Can be differentiated once.
    """
    cos, sin = (table.unsqueeze(-2) for table in rotary)
    if torch.compiler.is_compiling():  # the compiler writes the gradient by itself
        return _turned(x, cos, sin, interleaved, False)
    return _Rotation.apply(x, cos, sin, interleaved)


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back, in as many passes over memory; autograd's takes twice as many."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return _turned(x, cos, sin, interleaved, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, -sin, False, ctx.interleaved), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, into_interleaved: bool) -> Tensor:
    """`x` with its last pairs turned, which lie one way or the other, before and after."""
    plain = x.shape[-1] - 2 * cos.shape[-1]
    out = torch.empty_like(x)
    out[..., :plain] = x[..., :plain]
    first, second = (part.float().contiguous() for part in _pairs(x[..., plain:], interleaved))
    out_first, out_second = _pairs(out[..., plain:], into_interleaved)
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The pairs' first and second coordinates, each a view of its own, which may be written to."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
