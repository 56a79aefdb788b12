"""AdamW, or Muon for hidden matrices beside AdamW, over a model's parameters by their role."""

from typing import Any

import torch
from torch import nn

from moe.config import OptimConfig
from moe.optim.muon import ExpertMuon, MuonWithAdamW
from moe.optim.roles import Roles, roles_of

__all__ = ["ExpertMuon", "MuonWithAdamW", "build_optimizer", "set_learning_rate"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` over every parameter of `model`.

    Matrices decay; norms, biases, the embedding and routers do not. A router's scale sets how sharply it chooses, and a
    decaying embedding shrinks rare tokens for not being seen.
    """
    roles = roles_of(model)
    return _adamw([*roles.muon, *roles.decayed], roles, config) if config.name == "adamw" else _muon(roles, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _adamw(decayed: list[nn.Parameter], roles: Roles, config: OptimConfig) -> torch.optim.AdamW:
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": roles.kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _muon(roles: Roles, config: OptimConfig) -> MuonWithAdamW:
    settings: dict[str, Any] = {
        "lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.muon_momentum,
        "adjust_lr_fn": "match_rms_adamw",
    }  # fmt: skip
    parts: dict[str, torch.optim.Optimizer] = {"adamw": _adamw(roles.decayed, roles, config)}
    if roles.hidden:
        parts["muon"] = torch.optim.Muon(roles.hidden, **settings)
    if roles.down:
        stacks = [{"params": roles.gate_up, "matrices": 2}, {"params": roles.down, "matrices": 1}]
        parts["experts"] = ExpertMuon(stacks, **settings)
    return MuonWithAdamW(parts)
