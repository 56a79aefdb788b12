"""config.json to ModelConfig and back, through the table of families; what cannot be computed is refused by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.hf.families import FAMILIES, GQA_ONLY, MLA_ONLY, MOE_ONLY, Family
from moe.hf.rope import rope_from_hub, rope_to_hub

__all__ = ["config_from_hub", "config_to_hub", "family_of"]

# Decided by how the model is built, not by a family's table.
_STRUCTURE = frozenset({"attention", "n_routed_experts"})
# How weights started out: of no concern to who computes with them.
_HISTORY = frozenset({"initialization"})


def config_from_hub(stored: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and our configuration of a parsed config.json. Raises ConfigError naming the unsupported field."""
    kind = stored.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"model_type={kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for name, only in family.refused.items():
        value = stored.get(name)
        if value is not None and value != only:
            raise ConfigError(f"{name}={value!r} is not supported for {kind}: only {only!r} is")
    _refuse_sliding_window(stored)
    values = {**family.fixed, **{ours: _value(stored, theirs, family) for ours, theirs in family.fields.items()}}
    values.update(rope_from_hub(stored, family.absent["rope_theta"]))
    if family.fixed["attention"] == "mla":
        values["n_shared_experts"] = values["n_shared_experts"] or 0
        for name in ("n_group", "topk_group"):
            values[name] = values[name] or 1  # null: no groups
        if values.get("num_nextn_predict_layers") is None:
            values["num_nextn_predict_layers"] = 0
        _refuse_grouped_latents(stored, values)
    if kind == "qwen3_moe":
        values["first_k_dense_replace"] = _leading_dense_layers(stored)
    if kind == "deepseek_v2":
        _settle_v2_groups(values)
    first, depth = values.get("first_k_dense_replace", 0), values["num_hidden_layers"]
    if isinstance(first, int) and isinstance(depth, int) and first >= depth:
        # a model without experts; DeepSeek's class has no other way to say it
        values = {name: value for name, value in values.items() if name not in MOE_ONLY | {"n_routed_experts"}}
    return family, ModelConfig(**values)


def config_to_hub(config: ModelConfig, dtype: str) -> tuple[Family, dict[str, Any]]:
    """The family `config` belongs to and its config.json. Raises ConfigError when transformers has no such class."""
    family = family_of(config)
    _refuse_what_their_class_lacks(family, config)
    stored = {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
    stored.update({name: only for name, only in family.refused.items() if name not in ("quantization_config",)})
    stored.update(
        model_type=family.model_type,
        architectures=[family.architecture],
        dtype=dtype,
        rope_parameters=rope_to_hub(config),
        # transformers' defaults are ids of the released tokenizers: generation would stop at a word of ours
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=True,
    )
    if config.attention == "gqa":
        stored["head_dim"] = config.qk_head_dim
        stored["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
    else:
        stored["num_key_value_heads"] = config.num_attention_heads
        if not config.is_moe:
            dense = config.num_hidden_layers + config.num_nextn_predict_layers
            stored.update(_PLACEHOLDERS, first_k_dense_replace=dense)
    if family.model_type == "qwen3_moe":
        stored.update(mlp_only_layers=list(range(config.first_k_dense_replace)), use_sliding_window=False)
    if family.model_type == "mixtral":
        stored["sliding_window"] = None
    return family, stored


# Fields transformers insists on in a DeepSeek model whose layers are all dense; no tensor has these shapes.
_PLACEHOLDERS = {
    "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The family whose class in transformers computes what `config` says. Raises ConfigError naming what none has."""
    if config.attention == "mla":
        softmax = config.is_moe and config.score_func == "softmax"
        family = FAMILIES["deepseek_v2" if softmax else "deepseek_v3"]
    elif config.is_moe:
        family = FAMILIES[{"none": "mixtral", "head": "qwen3_moe", "full": "olmoe"}[config.qk_norm]]
    elif config.qk_norm == "full":
        raise ConfigError("model.qk_norm='full' has no dense family in transformers: use 'head' or 'none'")
    else:
        without_norms = "qwen2" if config.attention_bias and not config.has_output_bias else "llama"
        family = FAMILIES[{"none": without_norms, "head": "qwen3"}[config.qk_norm]]
    for field in dataclasses.fields(config):
        name = field.name
        known = name in family.fields or name in _STRUCTURE | _HISTORY or name.startswith("rope_")
        if known or (name == "first_k_dense_replace" and family.model_type == "qwen3_moe"):
            continue
        if name in (GQA_ONLY if config.attention == "mla" else MLA_ONLY) or (name in MOE_ONLY and not config.is_moe):
            continue
        value, only = getattr(config, name), family.fixed.get(name, field.default)
        if value != only:
            raise ConfigError(f"model.{name}={value!r} cannot be exported: {family.architecture} has only {only!r}")
    return family


def _value(stored: Mapping[str, Any], name: str, family: Family) -> Any:
    if name in stored:
        return stored[name]
    if name in family.alias and family.alias[name] in stored:
        return stored[family.alias[name]]
    if name in family.absent or name in ("head_dim", "num_key_value_heads"):
        return family.absent.get(name)
    raise ConfigError(f"{name} is missing: {family.model_type} needs it")


def _refuse_sliding_window(stored: Mapping[str, Any]) -> None:
    """A window as long as the longest sequence never cuts anything off; Qwen has a switch beside its width."""
    window, longest = stored.get("sliding_window"), stored.get("max_position_embeddings")
    if window is not None and stored.get("use_sliding_window", True) and (longest is None or window < longest):
        raise ConfigError(f"sliding_window={window!r} is not supported: attention sees all earlier positions")
    layer_types = stored.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"layer_types={layer_types!r} is not supported: every layer has full attention")


def _refuse_grouped_latents(stored: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    heads = stored.get("num_key_value_heads")
    if heads not in (None, values["num_attention_heads"]):
        raise ConfigError(
            f"num_key_value_heads={heads!r} is not supported: latent attention expands one key a query head "
            f"({values['num_attention_heads']})"
        )


def _settle_v2_groups(values: dict[str, Any]) -> None:
    """V2's two ways of choosing; the greedy one ignores groups, whatever n_group says."""
    method = values["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"topk_method={method!r} is not supported for deepseek_v2: greedy or group_limited_greedy")
    if method == "greedy":
        values.update(n_group=1, topk_group=1)


def _leading_dense_layers(stored: Mapping[str, Any]) -> int:
    """Qwen's list of dense layers as our count of first ones."""
    dense = sorted(stored.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))):
        raise ConfigError(f"mlp_only_layers={dense!r} is not supported: dense layers must be the first ones")
    return len(dense)


def _refuse_what_their_class_lacks(family: Family, config: ModelConfig) -> None:
    """Limits of transformers' classes that ours do not share."""
    if family.model_type == "deepseek_v2" and config.topk_method == "noaux_tc":
        config.fail(
            "topk_method", f"cannot be exported: {family.architecture} has no expert bias beside softmax scores"
        )
    if family.model_type == "deepseek_v3" and config.n_routed_experts == 1:
        config.fail("n_routed_experts", f"cannot be exported: {family.architecture} adds the two best of a group")
    if family.model_type in ("llama", "deepseek_v2") and config.hidden_size % config.num_attention_heads:
        config.fail(
            "hidden_size",
            f"cannot be exported: {family.architecture} wants a multiple of num_attention_heads "
            f"({config.num_attention_heads})",
        )
    if family.model_type == "olmoe" and config.qk_head_dim * config.num_attention_heads != config.hidden_size:
        config.fail("head_dim", f"cannot be exported: {family.architecture} has hidden_size / num_attention_heads")
