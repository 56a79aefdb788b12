"""Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467): torch's, made to work beside mixed precision."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["RMSNorm"]


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the input's dtype, summed in fp32.

    Takes the arguments of `torch.nn.RMSNorm`, but always has a weight; on a CPU it can be differentiated once. Under
    autocast an activation is bf16 and the weight fp32; torch's fused kernel wants both alike.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, normalized_shape) to the same shape and dtype."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # the compiler fuses by itself
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return _UnfusedRMSNorm.apply(x, self.weight, eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _UnfusedRMSNorm(torch.autograd.Function):
    """The same where torch has no fused kernel: its composition keeps x twice and takes twice as long as this one.

    With r = 1 / sqrt(mean(x^2) + eps), a number a row:  dw = sum of dy x r,   dx = (dy w - x r^2 mean(dy x w)) r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows(x, weight)
        inverse = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square().div(weight.numel()).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (rows * inverse).mul_(weight.flatten()).to(x.dtype).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        rows, dy = _rows(x, weight), _rows(dy, weight)
        by_row = weight.flatten().to(dy.dtype)
        product = dy * rows
        d_weight = torch.mv(product.t(), inverse.flatten())
        shift = torch.mv(product, by_row).unsqueeze(1).mul_(inverse.square()).div_(weight.numel())
        dx = torch.mul(dy, by_row, out=product).addcmul_(rows, shift, value=-1).mul_(inverse)
        return dx.to(x.dtype).view_as(x), d_weight.to(weight.dtype).view_as(weight), None


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """`x` as a matrix with a norm a row, in fp32 at least."""
    return x.reshape(-1, weight.numel()).to(torch.promote_types(x.dtype, torch.float32))
