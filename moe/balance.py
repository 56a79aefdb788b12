"""Load balancing as pure tensor functions: loads in, biases and measures out.

Loads are `tokens_per_expert`: how many routed rows each of E experts was given.
"""

import math

import torch
from torch import Tensor

__all__ = ["entropy", "max_vio", "sign_update"]


def sign_update(expert_bias: Tensor, tokens_per_expert: Tensor, speed: float) -> Tensor:
    """The bias after one step: b_i + speed * sign(mean load - load_i) (arXiv:2408.15664, Algorithm 1).

    Both (E,); the bias fp32. An expert at the mean exactly keeps its bias.
    """
    load = tokens_per_expert.to(torch.float32)
    return expert_bias + speed * torch.sign(load.mean() - load)


def max_vio(tokens_per_expert: Tensor) -> Tensor:
    """(largest load - mean load) / mean load over the last dimension; 0 is perfect balance (arXiv:2408.15664 eq. 4).

    A layer without any token has no violation: 0.
    """
    load = tokens_per_expert.to(torch.float32)
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean.clamp_min(torch.finfo(torch.float32).tiny)


def entropy(tokens_per_expert: Tensor) -> Tensor:
    """Entropy of the load over the last dimension divided by ln E: 1 is perfect balance, 0 all on one expert."""
    load = tokens_per_expert.to(torch.float32)
    share = load / load.sum(-1, keepdim=True).clamp_min(1)
    experts = load.shape[-1]
    return torch.special.entr(share).sum(-1) / math.log(experts) if experts > 1 else torch.ones_like(share.sum(-1))
