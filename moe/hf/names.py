"""Which tensors of a hub file make up each of ours.

Routed experts lie in the hub's files one by one, three matrices each; ours are two stacked tensors, so a piece is a hub
name with the part of our tensor it fills. transformers can also write the stacked tensors themselves: a second layout.

    ours                                    hub (Mixtral's words: block_sparse_moe, w1 w3 w2)
    layers.3.mlp.router.weight              model.layers.3.mlp.gate.weight
    layers.3.mlp.router.expert_bias         model.layers.3.mlp.gate.e_score_correction_bias
    layers.3.mlp.experts.gate_up_proj[5]    model.layers.3.mlp.experts.5.gate_proj.weight over …up_proj.weight
    layers.3.mlp.experts.down_proj[5]       model.layers.3.mlp.experts.5.down_proj.weight
    lm_head.weight                          lm_head.weight
    anything else                           model.anything else
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from moe.hf.families import Family

__all__ = ["Piece", "layouts", "means_nothing"]

_ROUTED = re.compile(
    r"(layers\.\d+\.)mlp\.(router\.weight|router\.expert_bias|experts\.gate_up_proj|experts\.down_proj)"
)
_GATE = {"router.weight": "gate.weight", "router.expert_bias": "gate.e_score_correction_bias"}


class Piece(NamedTuple):
    """A hub tensor, and the part of ours it is."""

    hub_name: str
    where: tuple[Any, ...]


def layouts(name: str, tensor: Tensor, family: Family) -> list[list[Piece]]:
    """Every way hub files of `family` hold our tensor `name`, the one we write first."""
    routed = _ROUTED.fullmatch(name)
    if routed is None:
        return [[Piece(name if name.startswith("lm_head.") else f"model.{name}", ())]]
    layer, part = routed.groups()
    blocks = dict.fromkeys((family.block, "mlp"))  # transformers 5 says mlp for Mixtral's block as well
    if part in _GATE:
        return [[Piece(f"model.{layer}{block}.{_GATE[part]}", ())] for block in blocks]
    apart = list(_expert_by_expert(f"model.{layer}{family.block}.experts", part, tensor, family))
    return [apart, [Piece(f"model.{layer}mlp.{part}", ())]]


def _expert_by_expert(prefix: str, part: str, tensor: Tensor, family: Family) -> Iterator[Piece]:
    gate, up, down = family.gate_up_down
    width = tensor.shape[1] // 2
    for expert in range(tensor.shape[0]):
        if part == "experts.down_proj":
            yield Piece(f"{prefix}.{expert}.{down}.weight", (expert,))
        else:
            yield Piece(f"{prefix}.{expert}.{gate}.weight", (expert, slice(0, width)))
            yield Piece(f"{prefix}.{expert}.{up}.weight", (expert, slice(width, None)))


def means_nothing(hub_name: str) -> bool:
    """Whether a hub tensor can be computed from the configuration: rotary frequencies, in files of 2023."""
    return hub_name.endswith(".rotary_emb.inv_freq")
