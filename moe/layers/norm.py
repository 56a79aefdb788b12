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

    With n = x / sqrt(mean(x^2) + eps):  dw = sum of dy n,   dx = (dy w - n mean(dy w n)) / sqrt(mean(x^2) + eps).
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
        normed = _rows(x, weight) * inverse
        dy = _rows(dy, weight)
        by_weight = dy * normed
        mean = torch.mv(by_weight, weight.flatten().to(by_weight.dtype)).div_(weight.numel()).unsqueeze(1)
        dx = (dy * weight.flatten()).addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype).view_as(x), by_weight.sum(0).to(weight.dtype).view_as(weight), None


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """`x` as a matrix with a norm a row, in fp32 at least."""
    return x.reshape(-1, weight.numel()).to(torch.promote_types(x.dtype, torch.float32))
