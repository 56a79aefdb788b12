"""Auxiliary-loss-free balancing of any module that has routers with an expert bias."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe import balance
from moe.config import BalanceConfig
from moe.errors import ConfigError
from moe.layers.router import LossWeights, Router
from moe.parallel.ranks import all_reduce_sum

__all__ = ["Balancer", "Load", "LoadCounter", "find_routers"]

_FIXED_POINT = 2**20  # a sum of weights travels as an integer: 2**43 tokens fit, to a millionth each


@dataclass(frozen=True)
class Load:
    """Load of each router over some tokens: name to `tokens_per_expert` (E,), summed over all ranks.

    `confidence`: name to the mean weight, before scaling, of the tokens' first choice; for routers that record it.
    `null_experts`: name to how many of the last experts compute nothing, for routers that have such.
    """

    tokens_per_expert: dict[str, Tensor]
    confidence: dict[str, Tensor] = field(default_factory=dict)
    null_experts: dict[str, int] = field(default_factory=dict)

    def max_vio(self) -> dict[str, float]:
        """Per router, (largest - mean) / mean."""
        return _numbers({name: balance.max_vio(load) for name, load in self.tokens_per_expert.items()})

    def entropy(self) -> dict[str, float]:
        """Per router, entropy of the load over ln E."""
        return _numbers({name: balance.entropy(load) for name, load in self.tokens_per_expert.items()})

    def dead_experts(self) -> dict[str, int]:
        """Per router, experts without a token; null ones have nothing to die of."""
        dead = _numbers({name: (self._real(name) == 0).sum() for name in self.tokens_per_expert})
        return {name: int(number) for name, number in dead.items()}

    def computed_share(self) -> float:
        """Share of all choices that fell on real experts: 1 without null experts, or without any choice."""
        real = sum(int(self._real(name).sum()) for name in self.tokens_per_expert)
        every = sum(int(load.sum()) for load in self.tokens_per_expert.values())
        return real / every if every else 1.0

    def _real(self, name: str) -> Tensor:
        load = self.tokens_per_expert[name]
        return load[: len(load) - self.null_experts.get(name, 0)]

    def metrics(self) -> dict[str, float]:
        """`router/*` as the trainer logs them: the worst layer's MaxVio and entropy, each layer's MaxVio, all dead."""
        if not self.tokens_per_expert:
            return {}
        max_vio = self.max_vio()
        row = {
            "router/max_vio": max(max_vio.values()),
            "router/entropy": min(self.entropy().values()),
            "router/dead_experts": sum(self.dead_experts().values()),
        }
        if self.null_experts:
            row["router/computed_share"] = self.computed_share()
        if self.confidence:
            row["router/confidence"] = sum(_numbers(self.confidence).values()) / len(self.confidence)
        return row | {f"router/max_vio/{_layer(name)}": value for name, value in max_vio.items()}


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that follow the protocol: attributes `expert_bias` (tensor or None) and `tokens_per_expert`."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "expert_bias") and hasattr(module, "tokens_per_expert")
    }


class Balancer:
    """Moves expert biases once per optimizer step, from the load of the whole global batch.

    Call `step()` after each optimizer step, or `skip()` when the step was skipped. What all routers recorded in all
    micro-batches travels in one all-reduce; every rank then computes the same biases bit for bit. `method="sign"` needs
    loads alone and works on any module that `find_routers` finds; the rest needs `moe.layers.Router`.

    Losses (`aux_loss_alpha` and so on, see `moe.config.BalanceConfig`) are asked of the routers, which are
    `moe.layers.Router`: a Transformer gives them as `ModelOutput.balance_loss`, other models by
    `moe.layers.router.take_balance_loss(model)` after each forward.

    Raises:
        ConfigError: a field is out of its range, or a router cannot be balanced by this method.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str = "sign",
        bias_update_speed: float = 1e-3,
        centre: bool = False,
        quantile_step: float = 1.0,
        aux_loss_alpha: float = 0.0,
        sequence_loss_alpha: float = 0.0,
        z_loss_alpha: float = 0.0,
    ) -> None:
        self._routers = find_routers(model)
        self._configure(
            BalanceConfig(
                method=method,  # type: ignore[arg-type]
                bias_update_speed=bias_update_speed,
                centre=centre,
                quantile_step=quantile_step,
                aux_loss_alpha=aux_loss_alpha,
                sequence_loss_alpha=sequence_loss_alpha,
                z_loss_alpha=z_loss_alpha,
            )
        )

    def _configure(self, config: BalanceConfig) -> None:
        """Check that every router can be balanced so, and tell it what to record."""
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
                router.collect_margins = config.method == "quantile"

    @torch.no_grad()
    def step(self) -> Load:
        """Update every bias from the load since the last step, clear the load, and return it."""
        load, margins = self._collect()
        speed, centre = self._config.bias_update_speed, self._config.centre
        for name, counts in load.tokens_per_expert.items():
            bias = self._routers[name].expert_bias
            if self._config.method == "sign":
                assert isinstance(bias, Tensor)
                bias.copy_(balance.sign_update(bias, counts, speed, centre=centre))
            elif name in margins:
                assert isinstance(bias, Tensor)
                step = self._config.quantile_step
                bias.copy_(balance.quantile_update(bias, margins[name], self._top_k(name), step))
        return load

    def skip(self) -> None:
        """Forget the load since the last step: the optimizer skipped it, so the biases must too."""
        for router in self._routers.values():
            if isinstance(router, Router):
                router.forget()
            else:
                router.tokens_per_expert = None  # type: ignore[assignment]

    def bias_range(self) -> float:
        """The worst router's largest minus smallest expert bias, now; 0 without biases."""
        biases = [router.expert_bias for router in self._routers.values() if isinstance(router.expert_bias, Tensor)]
        return max(_numbers({str(n): b.max() - b.min() for n, b in enumerate(biases)}).values(), default=0.0)

    def _collect(self) -> tuple[Load, dict[str, Tensor]]:
        """Load and margins since the last step, summed over ranks in one all-reduce; forgets them."""
        counts: dict[str, Tensor] = {}
        margins: dict[str, Tensor] = {}
        first: dict[str, Tensor] = {}
        for name, router in self._routers.items():
            if not isinstance(router.tokens_per_expert, Tensor):
                continue
            counts[name] = router.tokens_per_expert
            if isinstance(router, Router) and router.first_choice is not None:
                # a sum of integers does not depend on the order of ranks
                first[name] = (router.first_choice * _FIXED_POINT).round().reshape(1)
            if isinstance(router, Router) and router.margin_histogram is not None:
                margins[name] = router.margin_histogram
        self.skip()
        counts, margins, first = _sum_over_ranks(counts, margins, first)
        confidence = {
            # every token was counted K times
            name: total[0] * self._top_k(name) / (_FIXED_POINT * counts[name].sum())
            for name, total in first.items()
        }
        return Load(counts, confidence, _null_experts(self._routers)), margins

    def _top_k(self, name: str) -> int:
        router = self._routers[name]
        assert isinstance(router, Router)
        return router.num_experts_per_tok


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
        return Load(_sum_over_ranks(self._counts)[0], null_experts=_null_experts(self._routers))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def count(_module: nn.Module, _args: object, route) -> None:  # type: ignore[no-untyped-def]
            counts = route.tokens_per_expert_E.detach()
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts

        return count


def _null_experts(routers: dict[str, nn.Module]) -> dict[str, int]:
    return {name: m.n_null_experts for name, m in routers.items() if isinstance(m, Router) and m.n_null_experts}


def _sum_over_ranks(*groups: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One all-reduce for everything; int64, so that any number of tokens adds up exactly."""
    parts = [part for group in groups for part in group.values()]
    if not parts:
        return [{} for _ in groups]
    total = all_reduce_sum(torch.cat([part.flatten().to(torch.int64) for part in parts]))
    pieces = iter(total.split([part.numel() for part in parts]))
    return [{name: next(pieces).view_as(part) for name, part in group.items()} for group in groups]


def _numbers(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as Python numbers, with one wait for the device."""
    if not tensors:
        return {}
    return dict(zip(tensors, torch.stack([t.to(torch.float64) for t in tensors.values()]).tolist(), strict=True))


def _layer(name: str) -> str:
    """`layers.3.mlp.router` to `layer_03`, `mtp.0.…` to `mtp_0`; a router in no numbered place keeps its name."""
    place = re.search(r"\b(layers|mtp)\.(\d+)\.", name)
    if place is None:
        return name
    return f"layer_{int(place[2]):02d}" if place[1] == "layers" else f"mtp_{place[2]}"
