"""AdamW over three groups of parameters, and the learning-rate schedule."""

import math

import torch
from torch import nn

from moe.config import OptimConfig

__all__ = ["build_optimizer", "learning_rate", "set_learning_rate"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW: matrices decay; norms, biases, the embedding and routers do not.

    A router's scale sets how sharply it chooses, and a decaying embedding shrinks rare tokens for not being seen.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    routers = {id(m.weight) for m in model.modules() if hasattr(m, "expert_bias")}
    for parameter in model.parameters():
        plain = parameter.dim() < 2 or id(parameter) in embeddings or id(parameter) in routers
        (kept if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up to `lr`, then a half cosine to `lr * min_lr_ratio`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
