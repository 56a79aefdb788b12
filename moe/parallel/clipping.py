"""The norm of a gradient that lies in many tensors, on one rank or several, and scaling it down.

    norm = sqrt(sum over all entries g of g^2)             in fp64
    g <- g * min(1, max_norm / (norm + 1e-6))              as torch.nn.utils.clip_grad_norm_

In fp32 a sum of millions of squares is off by another amount for every way to cut the gradient up. In fp64 every engine
finds the same norm, so all of them scale, and train, alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["scale", "sum_of_squares"]

# entries converted at a time: on a CPU they then lie in the cache; on a GPU they take 128 MiB, not twice the gradient
_CHUNK, _CHUNK_ON_GPU = 2**18, 2**24


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all entries, fp64, on the gradients' device; 0 on the CPU without any."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    device = gradients[0].device
    chunk = _CHUNK if device.type == "cpu" else _CHUNK_ON_GPU
    room = torch.empty(min(chunk, max(g.numel() for g in gradients)), dtype=torch.float64, device=device)
    sums = []
    for gradient in gradients:
        for part in gradient.flatten().split(chunk):
            wide = room[: part.numel()].copy_(part)
            sums.append(torch.dot(wide, wide))
    return torch.stack(sums).sum()


def scale(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients whose global norm is `norm` to at most `max_norm`, in place, without waiting for a GPU."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
