"""A directory in Hugging Face's format becomes a moe.Transformer; every tensor in it is accounted for."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.hf.families import Family
from moe.hf.files import HubTensors, read_json
from moe.hf.names import layouts, means_nothing
from moe.hf.settings import config_from_hub
from moe.model import Transformer

__all__ = ["load"]


def load(directory: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """Load a model of a supported family from its config.json and safetensors. Nothing is downloaded or executed.

    Args:
        directory: holds config.json and model.safetensors, or several files with model.safetensors.index.json.
        dtype: of the parameters; None for the one config.json states. Expert biases are always fp32. Give torch.float32
            to fine-tune: steps are lost in bf16 weights.

    Raises:
        ConfigError: config.json asks for something this package does not compute; names the field.
        CheckpointError: a file cannot be read, or a tensor is missing, unexpected or of the wrong shape; names it.
    """
    directory = Path(directory)
    stored = read_json(directory / "config.json")
    if stored.get("format") == "frugal-moe":
        raise CheckpointError(f"{directory} is in our own format: load it with moe.Transformer.from_pretrained")
    try:
        family, config = config_from_hub(stored)
    except ConfigError as error:
        raise ConfigError(f"{directory / 'config.json'}: {error}") from None
    except (TypeError, ValueError) as error:  # text where a number should be, and the like
        raise ConfigError(f"{directory / 'config.json'} has a value of a wrong kind: {error}") from None
    hub = HubTensors(directory)
    _refuse_fp8(hub)
    with torch.device("meta"):
        model = Transformer(config)
    state = _assemble(model, hub, family, dtype or _stored_dtype(stored, hub))
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _assemble(model: Transformer, hub: HubTensors, family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our tensors by name, filled from the hub's, which must all be used."""
    config = model.config
    left = hub.names()
    state: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            _check_tied_head(hub, left)
            state[name] = state["embed_tokens.weight"]
            continue
        ways = layouts(name, empty, family)
        way = next((way for way in ways if any(piece.hub_name in left for piece in way)), ways[0])
        filled = torch.empty(empty.shape, dtype=torch.float32 if name.endswith("expert_bias") else dtype)
        for piece in way:
            if piece.hub_name not in left:
                raise CheckpointError(f"{hub.directory} has no tensor {piece.hub_name}, which its config.json implies")
            left.remove(piece.hub_name)
            _fill(filled[piece.where], hub, piece.hub_name)
        state[name] = filled
    _settle_rest(left, hub, config)
    return state


def _fill(part: Tensor, hub: HubTensors, hub_name: str) -> None:
    shape = hub.shape(hub_name)
    if shape != list(part.shape):
        raise CheckpointError(
            f"{hub_name} in {hub.directory} has shape {tuple(shape)}; its config.json implies {tuple(part.shape)}"
        )
    part.copy_(hub.read(hub_name))


def _check_tied_head(hub: HubTensors, left: set[str]) -> None:
    """Some files hold the shared matrix twice; two different ones would mean it is not shared."""
    if "lm_head.weight" in left and "model.embed_tokens.weight" in hub.names():
        left.remove("lm_head.weight")
        if not torch.equal(hub.read("lm_head.weight"), hub.read("model.embed_tokens.weight")):
            raise CheckpointError(
                f"lm_head.weight in {hub.directory} differs from the embedding although tie_word_embeddings is true"
            )


def _settle_rest(left: set[str], hub: HubTensors, config: ModelConfig) -> None:
    """Drop what holds nothing (no shared experts: matrices of width 0) and, with a notice, multi-token prediction."""
    predictors, unexpected = set(), []
    for name in sorted(left):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and config.attention == "mla" and int(layer[1]) >= config.num_hidden_layers:
            predictors.add(int(layer[1]))
        elif not means_nothing(name) and 0 not in hub.shape(name):
            unexpected.append(name)
    if unexpected:
        raise CheckpointError(f"{hub.directory} has an unexpected tensor {unexpected[0]}{_more(unexpected)}")
    if predictors:
        warnings.warn(
            f"{hub.directory}: dropped {len(predictors)} multi-token prediction layer(s) after the model's "
            f"{config.num_hidden_layers}; the model itself is whole",
            stacklevel=4,
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _refuse_fp8(hub: HubTensors) -> None:
    scaled = sorted(name for name in hub.names() if name.endswith("_scale_inv"))
    if scaled:
        raise ConfigError(f"{scaled[0]} in {hub.directory}: FP8 weights are not supported; convert them to bf16 first")


def _stored_dtype(stored: Mapping[str, Any], hub: HubTensors) -> torch.dtype:
    """What config.json states (`dtype`; `torch_dtype` before transformers 5), or else the embedding's."""
    said = stored.get("dtype") or stored.get("torch_dtype")
    if said is None:
        name = "model.embed_tokens.weight"
        return hub.read(name).dtype if name in hub.names() else torch.float32
    if said not in ("float32", "bfloat16", "float16", "float64"):
        raise ConfigError(f"dtype={said!r} of config.json is not supported: float32, bfloat16, float16 or float64")
    return getattr(torch, said)
