"""The dtype matrix products are in."""

import torch
from torch import Tensor

__all__ = ["as_multiplied"]


def as_multiplied(x: Tensor) -> Tensor:
    """`x` in autocast's dtype where that is on: cast once for all the linear layers that read it, and kept once.

    Left to itself, autocast casts and keeps an activation anew for each of them.
    """
    device_type = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x
