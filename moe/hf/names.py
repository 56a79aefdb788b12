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

DeepSeek-V3 numbers multi-token prediction modules on behind its decoder layers, 61 of them in the released model, and
each holds copies of embedding and head, which are the model's own:

    mtp.0.enorm.weight, hnorm, eh_proj      model.layers.61.enorm.weight, hnorm, eh_proj
    mtp.0.layer.anything                    model.layers.61.anything
    mtp.0.norm.weight                       model.layers.61.shared_head.norm.weight
    embed_tokens.weight, again              model.layers.61.embed_tokens.weight
    lm_head.weight, again                   model.layers.61.shared_head.head.weight
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from moe.config import ModelConfig
from moe.hf.families import Family

__all__ = ["Piece", "copies", "layer_of", "layouts", "means_nothing"]

_ROUTED = re.compile(
    r"(layers\.\d+\.)mlp\.(router\.weight|router\.expert_bias|experts\.gate_up_proj|experts\.down_proj)"
)
_PREDICTOR = re.compile(r"mtp\.(\d+)\.(?:(layer|norm)\.)?")
_GATE = {"router.weight": "gate.weight", "router.expert_bias": "gate.e_score_correction_bias"}


class Piece(NamedTuple):
    """A hub tensor, and the part of ours it is."""

    hub_name: str
    where: tuple[Any, ...]


def layouts(name: str, tensor: Tensor, family: Family, config: ModelConfig) -> list[list[Piece]]:
    """Every way hub files of `family` hold our tensor `name`, the one we write first."""
    name = _PREDICTOR.sub(lambda found: _in_the_row_of_layers(found, config.num_hidden_layers), name)
    routed = _ROUTED.fullmatch(name)
    if routed is None:
        return [[Piece(name if name.startswith("lm_head.") else f"model.{name}", ())]]
    layer, part = routed.groups()
    blocks = dict.fromkeys((family.block, "mlp"))  # transformers 5 says mlp for Mixtral's block as well
    if part in _GATE:
        return [[Piece(f"model.{layer}{block}.{_GATE[part]}", ())] for block in blocks]
    apart = list(_expert_by_expert(f"model.{layer}{family.block}.experts", part, tensor, family))
    return [apart, [Piece(f"model.{layer}mlp.{part}", ())]]


def copies(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Hub tensors that repeat one of the model's own, with our name of it."""
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        yield f"model.layers.{layer}.embed_tokens.weight", "embed_tokens.weight"
        yield f"model.layers.{layer}.shared_head.head.weight", "lm_head.weight"


def layer_of(hub_name: str) -> int:
    """The number of the decoder layer or multi-token prediction module a hub tensor belongs to; -1 for none."""
    found = re.match(r"model\.layers\.(\d+)\.", hub_name)
    return int(found[1]) if found else -1


def _in_the_row_of_layers(predictor: re.Match[str], num_hidden_layers: int) -> str:
    number, part = predictor.groups()
    place = f"layers.{num_hidden_layers + int(number)}."
    return place + "shared_head.norm." if part == "norm" else place


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
