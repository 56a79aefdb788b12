"""A directory in Hugging Face's format becomes a moe.Transformer; every tensor in it is accounted for."""

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
from moe.hf.names import copies, layer_of, layouts, means_nothing
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
    if config.num_nextn_predict_layers and not any(layer_of(name) >= config.num_hidden_layers for name in hub.names()):
        warnings.warn(
            f"{directory}: config.json states num_nextn_predict_layers={config.num_nextn_predict_layers}, but the "
            "files hold none of their weights: loaded without multi-token prediction",
            stacklevel=2,
        )
        config = config.replace(num_nextn_predict_layers=0)
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
            _check_copy("lm_head.weight", "embed_tokens.weight", hub, left)
            state[name] = state["embed_tokens.weight"]
            continue
        ways = layouts(name, empty, family, config)
        way = next((way for way in ways if any(piece.hub_name in left for piece in way)), ways[0])
        filled = torch.empty(empty.shape, dtype=torch.float32 if name.endswith("expert_bias") else dtype)
        for piece in way:
            if piece.hub_name not in left:
                raise CheckpointError(f"{hub.directory} has no tensor {piece.hub_name}, which its config.json implies")
            left.remove(piece.hub_name)
            _fill(filled[piece.where], hub, piece.hub_name)
        state[name] = filled
    for hub_name, name in copies(config):
        _check_copy(hub_name, name, hub, left)
    _settle_rest(left, hub, family, config)
    return state


def _fill(part: Tensor, hub: HubTensors, hub_name: str) -> None:
    shape = hub.shape(hub_name)
    if shape != list(part.shape):
        raise CheckpointError(
            f"{hub_name} in {hub.directory} has shape {tuple(shape)}; its config.json implies {tuple(part.shape)}"
        )
    part.copy_(hub.read(hub_name))


def _check_copy(copy: str, name: str, hub: HubTensors, left: set[str]) -> None:
    """Some files hold a shared matrix twice; two different ones would mean it is not shared."""
    if copy not in left:
        return
    left.remove(copy)
    held_as = "lm_head.weight" if name == "lm_head.weight" and name in hub.names() else "model.embed_tokens.weight"
    if not torch.equal(hub.read(copy), hub.read(held_as)):
        raise CheckpointError(f"{copy} in {hub.directory} differs from {held_as}, whose copy it is")


def _settle_rest(left: set[str], hub: HubTensors, family: Family, config: ModelConfig) -> None:
    """Drop what holds nothing (no shared experts: matrices of width 0) and, with a notice, predictors not stated."""
    predictors, unexpected = set(), []
    stated = config.num_hidden_layers + config.num_nextn_predict_layers
    for name in sorted(left):
        if "num_nextn_predict_layers" in family.fields and layer_of(name) >= stated:
            predictors.add(layer_of(name))
        elif not means_nothing(name) and 0 not in hub.shape(name):
            unexpected.append(name)
    if unexpected:
        raise CheckpointError(f"{hub.directory} has an unexpected tensor {unexpected[0]}{_more(unexpected)}")
    if predictors:
        warnings.warn(
            f"{hub.directory}: dropped {len(predictors)} multi-token prediction layer(s) beyond the "
            f"num_nextn_predict_layers={config.num_nextn_predict_layers} of config.json; the model itself is whole",
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
