"""What each parameter of a model is to an optimizer, told by the module that owns it, never by its name."""

from dataclasses import dataclass, field

from torch import nn

from moe.layers.experts import Experts
from moe.layers.head import OutputHead

__all__ = ["Roles", "roles_of"]


@dataclass(frozen=True)
class Roles:
    """Every parameter of a model once.

    hidden: matrices between the embedding and the head, those of attention and of multi-token prediction included
    gate_up, down: stacked matrices of routed experts, (E, 2F, D) and (E, D, F)
    decayed: what else decays: the output head, and in other people's modules weights of three and more dimensions
    kept: what does not decay: norms, biases, embeddings (also one that is the head as well), routers
    """

    hidden: list[nn.Parameter] = field(default_factory=list)
    gate_up: list[nn.Parameter] = field(default_factory=list)
    down: list[nn.Parameter] = field(default_factory=list)
    decayed: list[nn.Parameter] = field(default_factory=list)
    kept: list[nn.Parameter] = field(default_factory=list)

    @property
    def muon(self) -> list[nn.Parameter]:
        """What Muon takes."""
        return [*self.hidden, *self.gate_up, *self.down]


def roles_of(model: nn.Module) -> Roles:
    """Sort the parameters of `model`. A router is what has an `expert_bias`, as for `moe.Balancer`."""
    roles = Roles()
    owned: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, OutputHead):
            owned.setdefault(id(module.weight), roles.decayed)
        elif isinstance(module, Experts):
            owned |= {id(module.gate_up_proj): roles.gate_up, id(module.down_proj): roles.down}
        elif isinstance(module, nn.Embedding) or hasattr(module, "expert_bias"):
            owned[id(module.weight)] = roles.kept  # also where the head is the same matrix
    by_shape = {1: roles.kept, 2: roles.hidden}
    for parameter in model.parameters():
        owned.get(id(parameter), by_shape.get(parameter.dim(), roles.decayed)).append(parameter)
    return roles
