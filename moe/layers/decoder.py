"""One decoder layer of a configuration: attention and feed-forward, each behind a norm and beside a residual."""

import dataclasses

from torch import Tensor, nn

from moe.config.architecture import Architecture
from moe.layers.attention import GroupedQueryAttention
from moe.layers.feed_forward import FeedForward
from moe.layers.memory import Memory
from moe.layers.mla import MultiHeadLatentAttention
from moe.layers.moe import MoE
from moe.layers.norm import RMSNorm
from moe.layers.rope import STRETCHINGS, Rotary, Stretching

__all__ = ["DecoderLayer", "stretching_of"]


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is dense or a mixture of experts by layer number.

    The pre-norm layer of Llama and DeepSeek (arXiv:2412.19437 section 2.1).

    Args:
        config: a `moe.ModelConfig`; what is wrong in it raised ConfigError when it was made.
        layer: number of the layer, from 0; `config.is_moe_layer(layer)` decides what its mlp is.
    """

    def __init__(self, config: Architecture, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = (
            _mixture(config)
            if config.is_moe_layer(layer)
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        counted_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) to (B, S, D), in the dtype of `x_BSD`; norms are summed in fp32.

        Args:
            rotary, mask, memory: as for `MultiHeadLatentAttention`; tables that many layers share are made once.
            counted_BS: (B, S) bool, false for padding, as for `MoE`; nothing to a dense layer.
        """
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, mask, memory)
        normed = self.post_attention_layernorm(x_BSD)
        return x_BSD + (self.mlp(normed, counted_BS) if isinstance(self.mlp, MoE) else self.mlp(normed))


def _attention(config: Architecture) -> nn.Module:
    if config.attention == "gqa":
        return GroupedQueryAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qk_norm=config.qk_norm,
            clip_qkv=config.clip_qkv,
            attention_bias=config.attention_bias,
            attention_output_bias=config.attention_output_bias,
            rope_theta=config.rope_theta,
            stretching=stretching_of(config),
            rms_norm_eps=config.rms_norm_eps,
        )
    return MultiHeadLatentAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.q_lora_rank,
        attention_bias=config.attention_bias,
        rope_theta=config.rope_theta,
        stretching=stretching_of(config),
        latent_norm_eps=config.latent_norm_eps,
    )


def stretching_of(config: Architecture) -> Stretching | None:
    """How the configuration stretches positions; None for not at all."""
    if config.rope_type == "default":
        return None
    kind = STRETCHINGS[config.rope_type]
    return kind(**{field.name: getattr(config, f"rope_{field.name}") for field in dataclasses.fields(kind)})


def _mixture(config: Architecture) -> MoE:
    return MoE(
        config.hidden_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.n_shared_experts,
        n_null_experts=config.n_null_experts,
        score_func=config.score_func,
        topk_method=config.topk_method,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
