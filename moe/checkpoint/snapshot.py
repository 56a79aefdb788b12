"""Everything a run is at one step, as tensors by name: taken from the living objects, and put back into them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.model import Transformer

__all__ = ["Snapshot", "capture", "random_states", "restore_optimizer", "restore_random"]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint folder holds. All tensors lie in CPU memory; with `copy` nobody else writes to them.

    `weights` are named as `Transformer.stored_weights`, `optimizer` as PARAMETER/FIELD; `state` is JSON.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict[str, Any]


def capture(model: Transformer, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, copy: bool) -> Snapshot:
    """The run as it is now. With `copy` training may go on while the snapshot is written."""
    still: Callable[[Tensor], Tensor] = _copied if copy else _on_cpu
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Snapshot(
        config=model.config,
        weights={name: still(tensor) for name, tensor in model.stored_weights().items()},
        optimizer={
            f"{names[id(parameter)]}/{field}": still(value)
            for parameter, fields in optimizer.state.items()
            for field, value in fields.items()
            if isinstance(value, Tensor)
        },
        random=random_states(),
        state={**state, "param_groups": [_named_group(group, names) for group in optimizer.param_groups]},
    )


def restore_optimizer(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Put `Snapshot.optimizer` and the stored `param_groups` into a new optimizer of the same parameters."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        by_parameter.setdefault(name, {})[field] = tensor
    for group, stored in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in stored.items() if key != "params"})
    for name, parameter in model.named_parameters():
        if name in by_parameter:
            optimizer.state[parameter] = {
                field: tensor if field == "step" and not parameter.is_cuda else tensor.to(parameter.device)
                for field, tensor in by_parameter[name].items()
            }


def random_states() -> dict[str, Tensor]:
    """States of the random generators of this process, as `Snapshot.random` has them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Set the random generators as `Snapshot.random` has them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _named_group(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key != "params"}
    return {**settings, "params": [names[id(parameter)] for parameter in group["params"]]}


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _copied(tensor: Tensor) -> Tensor:
    here = _on_cpu(tensor)
    return here.clone() if here.data_ptr() == tensor.data_ptr() else here
