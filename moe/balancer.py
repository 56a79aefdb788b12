"""Auxiliary-loss-free balancing of any module that has routers with an expert bias."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe import balance
from moe.config import BalanceConfig
from moe.errors import ConfigError
from moe.layers.router import LossWeights, Router
from moe.parallel.ranks import all_reduce_sum

__all__ = ["Balancer", "Load", "LoadCounter", "find_routers"]


@dataclass(frozen=True)
class Load:
    """Load of each router over some tokens: name to `tokens_per_expert` (E,), summed over all ranks."""

    tokens_per_expert: dict[str, Tensor]

    def max_vio(self) -> dict[str, float]:
        """Per router, (largest - mean) / mean."""
        return {name: float(balance.max_vio(load)) for name, load in self.tokens_per_expert.items()}

    def entropy(self) -> dict[str, float]:
        """Per router, entropy of the load over ln E."""
        return {name: float(balance.entropy(load)) for name, load in self.tokens_per_expert.items()}

    def dead_experts(self) -> dict[str, int]:
        """Per router, experts without a token."""
        return {name: int((load == 0).sum()) for name, load in self.tokens_per_expert.items()}


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that follow the protocol: attributes `expert_bias` (tensor or None) and `tokens_per_expert`."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "expert_bias") and hasattr(module, "tokens_per_expert")
    }


class Balancer:
    """Moves expert biases once per optimizer step, from the load of the whole global batch.

    Call `step()` after each optimizer step, or `skip()` when the step was skipped. The loads of all routers and all
    micro-batches travel in one all-reduce; every rank then computes the same biases bit for bit.

    Losses (`aux_loss_alpha` and so on, see `moe.config.BalanceConfig`) are asked of the routers, which are
    `moe.layers.Router`: a Transformer gives them as `ModelOutput.balance_loss`, other models by
    `moe.layers.router.take_balance_loss(model)` after each forward.

    Raises:
        ConfigError: a field is out of its range, or a router cannot be balanced by this method.
    """

    def __init__(self, model: nn.Module, *, method: str = "sign", bias_update_speed: float = 1e-3) -> None:
        self._routers = find_routers(model)
        self.configure(BalanceConfig(method=method, bias_update_speed=bias_update_speed))  # type: ignore[arg-type]

    def configure(self, config: BalanceConfig) -> None:
        """Balance by this section from the next forward on."""
        for name, router in self._routers.items():
            if config.moves_biases and router.expert_bias is None:
                raise ConfigError(
                    f"balance.method={config.method!r} needs an expert bias, and router {name!r} has none; use none"
                )
            if isinstance(router, Router):
                config.check_router(router.n_group, router.num_experts_per_tok, router.weight.shape[0])
            elif config.method == "quantile" or config.has_losses:
                raise ConfigError(f"router {name!r} is not a moe.layers.Router: balance it by balance.method='sign'")
        self._config = config
        weights = LossWeights(config.aux_loss_alpha, config.sequence_loss_alpha, config.z_loss_alpha)
        for router in self._routers.values():
            if isinstance(router, Router):
                router.loss_weights = weights if config.has_losses else None

    def step(self) -> Load:
        """Update every bias from the load since the last step, clear the load, and return it."""
        load = self._collect()
        if self._config.method == "sign":
            with torch.no_grad():
                for name, counts in load.tokens_per_expert.items():
                    bias = self._routers[name].expert_bias
                    assert isinstance(bias, Tensor)
                    bias.copy_(
                        balance.sign_update(bias, counts, self._config.bias_update_speed, centre=self._config.centre)
                    )
        return load

    def skip(self) -> None:
        """Forget the load since the last step: the optimizer skipped it, so the biases must too."""
        for router in self._routers.values():
            router.tokens_per_expert = None  # type: ignore[assignment]

    def _collect(self) -> Load:
        counted = {n: r.tokens_per_expert for n, r in self._routers.items() if r.tokens_per_expert is not None}
        self.skip()
        return _sum_over_ranks(counted)  # type: ignore[arg-type]


class LoadCounter:
    """Counts load in a `with` block whatever the mode, without touching the balancer's counts: for evaluation.

    >>> with LoadCounter(model) as counter: evaluate()
    >>> counter.load().max_vio()
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = find_routers(model)
        self._counts: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "LoadCounter":
        for name, router in self._routers.items():
            self._handles.append(router.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def load(self) -> Load:
        """What was counted, summed over ranks; every rank must call it."""
        return _sum_over_ranks(self._counts)

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def count(_module: nn.Module, _args: object, route) -> None:  # type: ignore[no-untyped-def]
            counts = route.tokens_per_expert_E.detach()
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts

        return count


def _sum_over_ranks(counts: dict[str, Tensor]) -> Load:
    """One all-reduce for all routers; int64, so that any number of tokens adds up exactly."""
    if not counts:
        return Load({})
    widths = [count.numel() for count in counts.values()]
    total = all_reduce_sum(torch.cat([count.to(torch.int64) for count in counts.values()]))
    return Load(dict(zip(counts, total.split(widths), strict=True)))
