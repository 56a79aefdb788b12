"""The families of models that can be read and written: which of their fields is which of ours.

Hugging Face names a family by `model_type` in config.json. What a family leaves open is in `fields`, copied one to one;
what all its models share is in `fixed`; everything else must be as `moe.ModelConfig` has it by default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "GQA_ONLY", "MLA_ONLY", "MOE_ONLY", "Family"]

# Fields of ours that mean something only with one kind of attention, or only with experts.
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
MLA_ONLY = frozenset({*_LATENT, "latent_norm_eps"})
GQA_ONLY = frozenset({"num_key_value_heads", "head_dim", "qk_norm", "attention_output_bias", "clip_qkv"})
MOE_ONLY = frozenset(
    {
        "n_shared_experts", "n_null_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace",
        "score_func", "topk_method", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    Args:
        model_type, architecture: as in config.json; `architecture` is the class transformers loads.
        fields: our field -> theirs, same meaning and unit.
        fixed: our field -> the value every model of the family has.
        absent: their field -> what a config.json means that leaves it out (the defaults of transformers' class).
        refused: their field -> the only value we can compute with; absent or null is that value too.
        alias: their field -> another name it goes by.
        block: name of a layer's mixture in the hub's files.
        gate_up_down: names of one expert's three matrices in the hub's files.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    absent: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)
    alias: Mapping[str, str] = field(default_factory=dict)
    block: str = "mlp"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_COMMON = _same(
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
_GQA = _same("num_key_value_heads", "head_dim")
_DEEPSEEK = {
    **_COMMON,
    **_same(*_LATENT),
    **_same(
        "attention_bias", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
        "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor",
    ),
}  # fmt: skip

_ABSENT = {"tie_word_embeddings": False, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
# What changes the computation wherever it is set. Dropout and jitter would act in training only, and silently not.
_REFUSED = {"hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None}
_DEEPSEEK_REFUSED = {**_REFUSED, "moe_layer_freq": 1}
# transformers' latent norms have this epsilon whatever rms_norm_eps is: no field of config.json reaches them.
_MLA = {"attention": "mla", "latent_norm_eps": 1e-6}
_GREEDY = {"attention": "gqa", "score_func": "softmax", "topk_method": "greedy"}

_ALL = (
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        fields={**_DEEPSEEK, **_same("norm_topk_prob", "num_nextn_predict_layers")},
        fixed={**_MLA, "score_func": "sigmoid", "topk_method": "noaux_tc"},
        absent={
            **_ABSENT, "attention_bias": False, "q_lora_rank": 1536, "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,  # transformers says 1, of files it wrote without any
        },
        refused={
            **_DEEPSEEK_REFUSED, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True,
        },
        alias={"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
    ),
    Family(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        fields={**_DEEPSEEK, "topk_method": "topk_method"},
        # transformers never normalises the weights, whatever norm_topk_prob says; no released model asks for it
        fixed={**_MLA, "score_func": "softmax", "norm_topk_prob": False},
        absent={
            **_ABSENT, "attention_bias": False, "q_lora_rank": 1536, "topk_method": "greedy", "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
        },
        refused={**_DEEPSEEK_REFUSED, "scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
        alias={"n_routed_experts": "num_experts"},
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        fields={
            **_COMMON, **_GQA, "n_routed_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok",
            "moe_intermediate_size": "intermediate_size",
        },
        fixed={**_GREEDY, "qk_norm": "none", "norm_topk_prob": True},
        absent={**_ABSENT, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6},
        refused={**_REFUSED, "router_jitter_noise": 0.0},
        alias={"num_local_experts": "num_experts"},
        block="block_sparse_moe",
        gate_up_down=("w1", "w3", "w2"),
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        fields={
            **_COMMON, **_GQA, "attention_bias": "attention_bias", "n_routed_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok", "moe_intermediate_size": "moe_intermediate_size",
            "norm_topk_prob": "norm_topk_prob",
        },
        fixed={**_GREEDY, "qk_norm": "head"},
        absent={**_ABSENT, "attention_bias": False, "num_key_value_heads": 4, "norm_topk_prob": False},
        refused={**_REFUSED, "decoder_sparse_step": 1},
        alias={"num_experts": "num_local_experts"},
    ),
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        fields={
            **_COMMON, **_GQA, "attention_bias": "attention_bias", "n_routed_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok", "moe_intermediate_size": "intermediate_size",
            "norm_topk_prob": "norm_topk_prob", "clip_qkv": "clip_qkv",
        },
        fixed={**_GREEDY, "qk_norm": "full"},
        absent={**_ABSENT, "rms_norm_eps": 1e-5, "attention_bias": False, "norm_topk_prob": False, "clip_qkv": None},
        refused=_REFUSED,
        alias={"num_experts": "num_local_experts"},
    ),
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        fields={**_COMMON, **_GQA, "attention_bias": "attention_bias"},
        fixed={"attention": "gqa", "qk_norm": "none"},
        absent={**_ABSENT, "attention_bias": False},
        refused={**_REFUSED, "mlp_bias": False},
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        fields={**_COMMON, **_GQA},
        fixed={"attention": "gqa", "qk_norm": "none", "attention_bias": True, "attention_output_bias": False},
        absent={**_ABSENT, "num_key_value_heads": 32},
        refused=_REFUSED,
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fields={**_COMMON, **_GQA, "attention_bias": "attention_bias"},
        fixed={"attention": "gqa", "qk_norm": "head"},
        absent={**_ABSENT, "attention_bias": False, "head_dim": 128, "num_key_value_heads": 32},
        refused=_REFUSED,
    ),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _ALL}
