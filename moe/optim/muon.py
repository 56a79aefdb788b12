"""Muon for stacked experts, and Muon beside AdamW as one optimizer (arXiv:2502.16982).

    m <- m + (1 - mu) (g - m)                          momentum
    u  = g + mu (m - g)                                Nesterov's look ahead
    W <- (1 - lr wd) W - lr a(r, c) orthogonal(u)      for every r x c matrix W

`orthogonal` is five steps of a quintic Newton-Schulz iteration in bf16, which moves all singular values to about 1.
With `match_rms_adamw` a(r, c) = 0.2 sqrt(max(r, c)): an orthogonal matrix has entries of root mean square
1 / sqrt(max(r, c)), and 0.2 is about that of AdamW's updates, so AdamW's learning rate and weight decay carry over
(arXiv:2502.16982 section 2.2). `torch.optim.Muon` is the same for single matrices, and takes those here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["ExpertMuon", "MuonWithAdamW", "newton_schulz"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0 that does not diverge (Jordan)
_STEPS = 5
_EPS = 1e-7
_BATCH = 2**26  # numbers orthogonalised at once: a quarter GB in fp32, some half more of products in bf16


class ExpertMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` on each matrix of stacked parameters (E, rows, columns), many matrices a product.

    A group's `matrices` says how many lie below one another in an expert: gate and up projection are stored as one
    (2F, D) but are two maps, and apart in every dense SwiGLU. Orthogonalised together, the rows of one would be turned
    away from the rows of the other, and what both learn alike would move each by 1 / sqrt(2) only. An expert without
    tokens has a gradient of zeros, and goes on along its momentum.

    Args:
        params: parameters of three dimensions, or groups of them.
        lr, weight_decay, momentum, nesterov, adjust_lr_fn: as for `torch.optim.Muon`, one spelling each.
        matrices: matrices in a parameter's second dimension, which they share evenly.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        matrices: int = 1,
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn, "matrices": matrices,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Works through a parameter some matrices at a time, so that little is kept beside it."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                rows, columns = parameter.shape[1] // group["matrices"], parameter.shape[2]
                weights = parameter.view(-1, rows, columns)
                buffers = state["momentum_buffer"].view_as(weights)
                grads = parameter.grad.reshape(weights.shape)  # a compiled backward may give other strides
                batch = max(1, _BATCH // (rows * columns))
                for part in zip(weights.split(batch), grads.split(batch), buffers.split(batch), strict=True):
                    _update(*part, group)
        return loss


def _update(weight: Tensor, grad: Tensor, buffer: Tensor, group: Mapping[str, Any]) -> None:
    """Muon's update of matrices (N, rows, columns), in place."""
    lr, (rows, columns) = group["lr"], weight.shape[1:]
    buffer.lerp_(grad, 1 - group["momentum"])
    update = newton_schulz(grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
    matches_adamw = group["adjust_lr_fn"] == "match_rms_adamw"
    ratio = 0.2 * math.sqrt(max(rows, columns)) if matches_adamw else math.sqrt(max(1, rows / columns))
    weight.mul_(1 - lr * group["weight_decay"])
    weight.add_(update, alpha=-lr * ratio)


def newton_schulz(matrices: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with their singular values moved to 0.7 … 1.2, in bf16; a zero matrix stays zero.

    The shorter side comes first, so that the products that make the polynomial are of that side squared.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, that look like one.

    Groups and state are this object's, so that checkpoints, accelerate and the learning rate know of one optimizer; a
    group's `part` names who takes it, and a part is lent its groups and the state for each step.

    Args:
        parts: optimizers by name, over different parameters; they are this object's from now on.
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        groups = [{**group, "part": name} for name, part in parts.items() for group in part.param_groups]
        super().__init__(groups, {})
        self._parts = dict(parts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for name, part in self._parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["part"] == name]
            part.step()
        return loss
