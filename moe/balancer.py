"""Auxiliary-loss-free balancing of any module that has routers with an expert bias."""

import logging
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from moe import balance
from moe.config import BalanceConfig
from moe.errors import ConfigError
from moe.layers.router import LossWeights, Router
from moe.parallel.ranks import all_reduce_sum, world_size

__all__ = ["Balancer", "Load", "LoadCounter", "find_routers"]

_log = logging.getLogger(__name__)
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

    def _with_nulls(self) -> list[tuple[str, Tensor]]:
        return [(name, load) for name, load in self.tokens_per_expert.items() if self.null_experts.get(name)]

    def _real(self, name: str) -> Tensor:
        load = self.tokens_per_expert[name]
        return load[: len(load) - self.null_experts.get(name, 0)]

    def metrics(self) -> dict[str, float]:
        """`router/*` as the trainer logs them, of each layer (`router/max_vio/layer_03`) and over layers.

        Over layers MaxVio and entropy are the worst layer's, dead experts all (null ones have nothing to die of), share
        of choices that were computed and confidence the mean. One wait for the device.
        """
        if not self.tokens_per_expert:
            return {}
        measures = {
            "max_vio": {name: balance.max_vio(load) for name, load in self.tokens_per_expert.items()},
            "entropy": {name: balance.entropy(load) for name, load in self.tokens_per_expert.items()},
            "dead_experts": {name: (self._real(name) == 0).sum() for name in self.tokens_per_expert},
            "computed_share": {name: self._real(name).sum() / load.sum() for name, load in self._with_nulls()},
            "confidence": self.confidence,
        }
        over_layers: dict[str, Callable[[list[float]], float]] = {
            "max_vio": max,
            "entropy": min,
            "dead_experts": sum,
            "computed_share": statistics.fmean,
            "confidence": statistics.fmean,
        }
        return _by_layer(measures, over_layers)


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
        self._warned = False
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
        config.check_contradictions()
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
        """Update every bias from the load since the last step, clear the load, and return it.

        When no router recorded any, the log says so, once.
        """
        config = self._config
        load, margins = self._collect()
        if config.moves_biases and self._routers and not load.tokens_per_expert:
            self._say_nothing_recorded()
        if config.method == "sign":
            update = partial(balance.sign_update, speed=config.bias_update_speed, centre=config.centre)
            self._move(load.tokens_per_expert, lambda bias, loads, _: update(bias, loads))
        elif config.method == "quantile":
            self._move(margins, partial(balance.quantile_update, step=config.quantile_step))
        return load

    def _say_nothing_recorded(self) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "Balancer.step() found no load recorded since the last step, and moves no expert bias by it: run the "
                "model before, in training mode, with gradients, and with routers that are trained"
            )

    def _move(self, recorded: dict[str, Tensor], update: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        """Biases of all layers of one kind in one stacked update: its launches come once a step, not once a layer."""
        kinds: dict[tuple[torch.Size, torch.dtype, int], list[tuple[Tensor, Tensor]]] = {}
        for name, counts in recorded.items():
            bias = self._routers[name].expert_bias
            assert isinstance(bias, Tensor)
            top_k = self._top_k(name) if isinstance(self._routers[name], Router) else 0  # the sign rule needs none
            kinds.setdefault((bias.shape, bias.dtype, top_k), []).append((bias, counts))
        for (_, _, top_k), pairs in kinds.items():
            biases, counts_of = zip(*pairs, strict=True)
            moved_LE = update(torch.stack(biases), torch.stack(counts_of), top_k)
            torch._foreach_copy_(biases, moved_LE.unbind())

    def skip(self) -> None:
        """Forget the load since the last step: the optimizer skipped it, so the biases must too."""
        for router in self._routers.values():
            if isinstance(router, Router):
                router.forget()
            else:
                router.tokens_per_expert = None  # type: ignore[assignment]

    def bias_metrics(self) -> dict[str, float]:
        """`router/bias_range`: largest minus smallest expert bias, of each layer and the worst; none without biases."""
        biases = {name: router.expert_bias for name, router in self._routers.items()}
        ranges = {name: bias.max() - bias.min() for name, bias in biases.items() if isinstance(bias, Tensor)}
        return _by_layer({"bias_range": ranges}, {"bias_range": max})

    def _collect(self) -> tuple[Load, dict[str, Tensor]]:
        """Load and margins since the last step, summed over ranks in one all-reduce; forgets them."""
        counts: dict[str, Tensor] = {}
        margins: dict[str, Tensor] = {}
        first: dict[str, Tensor] = {}
        for name, router in self._routers.items():
            recorded = router.tokens_per_expert
            if isinstance(recorded, Tensor):
                counts[name] = recorded
            elif world_size() > 1:
                counts[name] = _nothing(router)  # other ranks may have routed by it, and all must send alike
            else:
                continue
            if isinstance(router, Router):
                choices = router.first_choice
                first[name] = counts[name].new_zeros((), dtype=torch.float64) if choices is None else choices
                if router.collect_margins:
                    histogram = router.margin_histogram
                    if histogram is None:
                        histogram = counts[name].new_zeros((len(counts[name]), balance.MARGIN_BINS))
                    margins[name] = histogram
        self.skip()
        # a sum of integers does not depend on the order of ranks
        fixed = {"": (torch.stack(list(first.values())) * _FIXED_POINT).round()} if first else {}
        counts, margins, fixed = _sum_over_ranks(counts, margins, fixed)
        confidence = {}
        if first:
            rows = torch.stack([counts[name].sum() for name in first])  # every token was counted K times
            shares = fixed[""] / (_FIXED_POINT * rows.clamp_min(1))
            confidence = {name: share * self._top_k(name) for name, share in zip(first, shares, strict=True)}
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
        self._routers = {name: router for name, router in find_routers(model).items() if isinstance(router, Router)}
        self._counts: dict[str, Tensor] = {}

    # state of the routers, not hooks: a compiled model looks at the one and is blind to the other
    def __enter__(self) -> "LoadCounter":
        for router in self._routers.values():
            router.observed, router.observed_load = True, None
        return self

    def __exit__(self, *_: object) -> None:
        self._counts = self._so_far()
        for router in self._routers.values():
            router.observed, router.observed_load = False, None

    def load(self) -> Load:
        """What was counted, summed over ranks; every rank must call it."""
        return Load(_sum_over_ranks(self._so_far())[0], null_experts=_null_experts(dict(self._routers)))

    def _so_far(self) -> dict[str, Tensor]:
        counts = {name: router.observed_load for name, router in self._routers.items()}
        return self._counts | {name: count for name, count in counts.items() if count is not None}


def _nothing(router: nn.Module) -> Tensor:
    """The load of a router that saw no token."""
    if isinstance(router, Router):  # whose weight may be cut up between ranks
        choices = router.n_routed_experts + router.n_null_experts
        return torch.zeros(choices, dtype=torch.int32, device=router.weight.device)
    assert isinstance(router.expert_bias, Tensor)
    return torch.zeros_like(router.expert_bias, dtype=torch.int32)


def _null_experts(routers: dict[str, nn.Module]) -> dict[str, int]:
    return {name: m.n_null_experts for name, m in routers.items() if isinstance(m, Router) and m.n_null_experts}


def _sum_over_ranks(*groups: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One all-reduce for everything; int64, so that any number of tokens adds up exactly."""
    parts = [part for group in groups for part in group.values()]
    if not parts:
        return [{} for _ in groups]
    whole = [part.to(torch.int64) if part.is_floating_point() else part for part in parts]
    total = all_reduce_sum(torch.cat([part.flatten() for part in whole]).to(torch.int64))
    pieces = iter(total.split([part.numel() for part in parts]))
    return [{name: next(pieces).view_as(part) for name, part in group.items()} for group in groups]


def _numbers(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as Python numbers, with one wait for the device."""
    if not tensors:
        return {}
    return dict(zip(tensors, torch.stack([t.to(torch.float64) for t in tensors.values()]).tolist(), strict=True))


def _by_layer(
    measures: dict[str, dict[str, Tensor]], over_layers: dict[str, Callable[[list[float]], float]]
) -> dict[str, float]:
    """Measure -> router -> scalar as `router/MEASURE/LAYER`, and over the layers as `router/MEASURE`."""
    flat = {f"router/{name}/{_layer(at)}": value for name, by in measures.items() for at, value in by.items()}
    numbers = _numbers(flat)
    row = {}
    for name, by in measures.items():
        if by:
            row[f"router/{name}"] = over_layers[name]([numbers[f"router/{name}/{_layer(at)}"] for at in by])
    return row | numbers


def _layer(name: str) -> str:
    """`layers.3.mlp.router` to `layer_03`, `mtp.0.…` to `mtp_0`; a router in no numbered place keeps its name."""
    place = re.search(r"\b(layers|mtp)\.(\d+)\.", name)
    if place is None:
        return name
    return f"layer_{int(place[2]):02d}" if place[1] == "layers" else f"mtp_{place[2]}"
