"""The oracle: the same weights in Hugging Face's models give the same logits, loss and gradients, in fp32."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moe.config import ModelConfig
from moe.model import Transformer

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers (extra `hf`)")

COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
MLA = dict(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
MOE = dict(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=20)

_RENAMED = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
}


def _hf_name(name: str) -> str:
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def _rope(config: ModelConfig) -> dict[str, object]:
    names = {
        "default": (),
        "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }[config.rope_type]
    given = {name: getattr(config, f"rope_{name}") for name in names}
    return {"rope_type": config.rope_type, "rope_theta": config.rope_theta, **{k: v for k, v in given.items() if v}}


def _deepseek_v3(config: ModelConfig) -> nn.Module:
    """Hugging Face's class knows no model without experts; layers before first_k_dense_replace are dense."""
    settings = {**COMMON, **MLA, **MOE, "intermediate_size": config.intermediate_size}
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **settings,
            q_lora_rank=config.q_lora_rank,
            num_key_value_heads=4,
            n_group=config.n_group,
            topk_group=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor,
            first_k_dense_replace=config.first_k_dense_replace if config.is_moe else config.num_hidden_layers,
            attention_bias=config.attention_bias,
            rope_interleave=True,
            rope_parameters=_rope(config),
        )
    )


def _llama(config: ModelConfig) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **COMMON, num_key_value_heads=config.num_key_value_heads, attention_bias=config.attention_bias,
            rope_parameters=_rope(config), tie_word_embeddings=config.tie_word_embeddings,
        )
    )  # fmt: skip


def _qwen3(config: ModelConfig) -> nn.Module:
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **COMMON, num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )  # fmt: skip


MOE_MODEL = ModelConfig(**COMMON, **MLA, **MOE, first_k_dense_replace=1, routed_scaling_factor=2.5)
STRETCHED = dict(rope_factor=8.0, rope_original_max_position_embeddings=16, rope_theta=500.0)
YARN = dict(**STRETCHED, rope_type="yarn", rope_beta_fast=4.0)
LLAMA3 = dict(**STRETCHED, rope_type="llama3", rope_low_freq_factor=0.5, rope_high_freq_factor=2.0)
CASES: dict[str, tuple[ModelConfig, Callable[[ModelConfig], nn.Module]]] = {
    "deepseek-v3": (MOE_MODEL, _deepseek_v3),
    "deepseek-v3-groups": (MOE_MODEL.replace(n_group=4, topk_group=2), _deepseek_v3),
    "deepseek-v3-q-lora-biases": (MOE_MODEL.replace(q_lora_rank=16, attention_bias=True), _deepseek_v3),
    "deepseek-v3-yarn": (MOE_MODEL.replace(**YARN, rope_mscale=1.0, rope_mscale_all_dim=0.7), _deepseek_v3),
    "llama-yarn": (ModelConfig(**COMMON, **YARN, attention="gqa"), _llama),
    "llama-3.1": (ModelConfig(**COMMON, **LLAMA3, attention="gqa"), _llama),
    "deepseek-v3-dense-twin": (MOE_MODEL.dense_twin(), _deepseek_v3),
    "llama": (ModelConfig(**COMMON, attention="gqa", num_key_value_heads=2), _llama),
    "llama-tied": (ModelConfig(**COMMON, attention="gqa", tie_word_embeddings=True, attention_bias=True), _llama),
    "qwen3": (ModelConfig(**COMMON, attention="gqa", num_key_value_heads=2, head_dim=16, qk_norm="head"), _qwen3),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_agree(case: str) -> None:
    """Random weights well away from initial values, non-centred biases, unshifted labels with some ignored."""
    config, build = CASES[case]
    torch.manual_seed(0)
    ours, theirs = Transformer(config), build(config)
    with torch.no_grad():
        for tensor in ours.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2 + (tensor.dim() == 1))
        for name, buffer in ours.named_buffers():
            assert name.endswith("expert_bias")
            buffer.copy_(torch.randn_like(buffer) * 0.3 + 2.0)
    state = {_hf_name(name): tensor for name, tensor in ours.state_dict().items()}
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    theirs.eval()
    ours.eval()
    ids = torch.randint(0, config.vocab_size, (3, 21))
    labels = ids.clone()
    labels[0, 5:9] = -100

    mine, other = ours(ids, labels=labels), theirs(ids, labels=labels)
    torch.testing.assert_close(mine.logits, other.logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mine.loss, other.loss, atol=1e-6, rtol=1e-6)
    mine.loss.backward()
    other.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[_hf_name(name)].grad
        assert expected is not None, name
        scale = expected.abs().max()
        # fp32 sums in another order: a thousandth of a percent of the tensor's largest gradient
        assert parameter.grad is not None
        assert (parameter.grad - expected).abs().max() <= 2e-5 * scale + 1e-9, name
