"""Grouped-query attention (Ainslie et al., arXiv:2305.13245), as in Llama, Qwen3 and OLMoE."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.layers.memory import Memory
from moe.layers.norm import RMSNorm
from moe.layers.precision import as_multiplied
from moe.layers.rope import Rotary, Stretching, apply_rotary, rotary_tables

__all__ = ["GroupedQueryAttention"]


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose query heads share fewer key and value heads (section 2 of the paper).

    Projections start as `nn.Linear` does. Inside a model of ours `moe.Transformer` initialises them anew.

    Args:
        hidden_size: width D of the input.
        num_attention_heads: query heads H.
        num_key_value_heads: key and value heads, a divisor of H; None for H.
        head_dim: width of a head, even; None for D / H.
        qk_norm: RMSNorm of queries and keys: "none", "head" (each head alone, Qwen3) or "full" (all heads, OLMoE).
        clip_qkv: largest magnitude of the entries of queries, keys and values after their norms and before positions,
            where transformers' OLMoE clamps them; None for any.
        attention_bias: biases in the projections.
        attention_output_bias: bias in the output projection, where it differs from the other three (Qwen2); None for as
            attention_bias.
        rope_theta: base of the rotary frequencies (pairs are halves).
        stretching: of the positions; None for none.
        rms_norm_eps: epsilon of the norms.

    Raises:
        ConfigError: heads do not divide, a head is of odd width, or `qk_norm` is unknown.

    Example:
        >>> attention = GroupedQueryAttention(64, num_attention_heads=4, num_key_value_heads=2)
        >>> attention(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qk_norm: Literal["none", "head", "full"] = "none",
        clip_qkv: float | None = None,
        attention_bias: bool = False,
        attention_output_bias: bool | None = None,
        rope_theta: float = 10000.0,
        stretching: Stretching | None = None,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_key_value_heads is not None and num_attention_heads % num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads={num_key_value_heads} must divide num_attention_heads ({num_attention_heads})"
            )
        if head_dim is None and hidden_size % num_attention_heads:
            raise ConfigError(
                f"hidden_size={hidden_size} must be divisible by num_attention_heads ({num_attention_heads}), "
                "or give head_dim"
            )
        if (head_dim or hidden_size // num_attention_heads) % 2:
            raise ConfigError(
                f"head_dim={head_dim or hidden_size // num_attention_heads} must be even: rotary positions turn pairs"
            )
        if qk_norm not in ("none", "head", "full"):
            raise ConfigError(f"qk_norm={qk_norm!r} must be none, head or full")
        self.num_heads = num_attention_heads
        self.num_kv_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rope_theta = rope_theta
        self.stretching = stretching
        self.qk_norm = qk_norm
        self.clip_qkv = clip_qkv
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, q_width, bias=attention_bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=attention_bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=attention_bias)
        output_bias = attention_bias if attention_output_bias is None else attention_output_bias
        self.o_proj = nn.Linear(q_width, hidden_size, bias=output_bias)
        if qk_norm != "none":
            self.q_norm = RMSNorm(self.head_dim if qk_norm == "head" else q_width, eps=rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim if qk_norm == "head" else kv_width, eps=rms_norm_eps)

    @property
    def rotary_dim(self) -> int:
        """Width the rotary tables must be made for."""
        return self.head_dim

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None = None, mask: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """(B, S, D) to (B, S, D), in the projections' dtype or autocast's; positions are turned in fp32.

        Args:
            rotary: tables for these positions, by `moe.layers.rope.rotary_tables`; None for positions 0 … S-1.
            mask: (B or 1, 1, S, keys) bool, true where a query may attend; None for all earlier tokens and itself.
            memory: where to store these tokens' keys and values, and find those of earlier ones.
        """
        batch, length, _ = x_BSD.shape
        x_BSD = as_multiplied(x_BSD)
        if rotary is None:
            positions = torch.arange(length, device=x_BSD.device)[None]
            rotary = rotary_tables(positions, self.rotary_dim, self.rope_theta, self.stretching)
        query, key, value = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.view(batch, length, -1, self.head_dim) for part in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if self.clip_qkv is not None:
            query, key, value = (part.clamp(-self.clip_qkv, self.clip_qkv) for part in (query, key, value))
        query, key = apply_rotary(query, rotary, interleaved=False), apply_rotary(key, rotary, interleaved=False)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if memory is not None:
            end = memory.start + length
            memory.store[0, :, :, memory.start : end] = key
            memory.store[1, :, :, memory.start : end] = value
            key, value = memory.store[:, :, :, :end].unbind()
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and (memory is None or memory.start == 0),
            enable_gqa=self.num_heads != self.num_kv_heads,
        )  # fmt: skip
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
