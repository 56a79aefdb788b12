"""Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467): torch's, made to work beside mixed precision."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["RMSNorm"]


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the input's dtype, summed in fp32.

    Takes the arguments of `torch.nn.RMSNorm`. Under autocast an activation is bf16 and the weight fp32; torch's fused
    kernel wants both alike.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, normalized_shape) to the same shape and dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
