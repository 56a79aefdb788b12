"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1; DeepSeek-V3, arXiv:2412.19437 section 2.1.1).

Keys and values of all heads come from one latent of `kv_lora_rank` numbers a token, and one rotary key of
`qk_rope_head_dim` numbers is shared by all heads; the two together are all a decoder must remember of a token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.layers.causal import causal_attention
from moe.layers.memory import Memory
from moe.layers.norm import RMSNorm
from moe.layers.precision import as_multiplied
from moe.layers.rope import Rotary, Stretching, apply_rotary, rotary_tables

__all__ = ["MultiHeadLatentAttention"]


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention over a compressed latent (DeepSeek-V3 eqs 1-11).

    Projections start as `nn.Linear` does. Inside a model of ours `moe.Transformer` initialises them anew.

    Args:
        hidden_size: width D of the input.
        num_attention_heads: heads H.
        kv_lora_rank: width C of the latent.
        qk_nope_head_dim: per head, query and key part without position.
        qk_rope_head_dim: per head, query and (shared) key part with rotary position, even (pairs are neighbours).
        v_head_dim: per head, value width.
        q_lora_rank: rank of the query projection; None for a full matrix.
        attention_bias: biases in the down-projections and the output projection, as in Hugging Face's DeepseekV3.
        rope_theta: base of the rotary frequencies.
        stretching: of the positions; None for none.
        latent_norm_eps: epsilon of the norms of the latents, of queries and of keys and values.

    Raises:
        ConfigError: `qk_rope_head_dim` is odd.

    Example:
        >>> attention = MultiHeadLatentAttention(
        ...     64, num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        ... )
        >>> attention(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        *,
        attention_bias: bool = False,
        rope_theta: float = 10000.0,
        stretching: Stretching | None = None,
        latent_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim={qk_rope_head_dim} must be even: rotary positions turn pairs")
        self.num_heads = num_attention_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.q_lora_rank = q_lora_rank
        self.softmax_scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        if stretching is not None:
            self.softmax_scale *= stretching.softmax_scale
        self.rope_theta = rope_theta
        self.stretching = stretching
        q_width = num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=attention_bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps=latent_norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=attention_bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, eps=latent_norm_eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_attention_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias=attention_bias)

    @property
    def rotary_dim(self) -> int:
        """Width the rotary tables must be made for."""
        return self.qk_rope_head_dim

    def forward(
        self, x_BSD: Tensor, rotary: Rotary | None = None, mask: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """(B, S, D) to (B, S, D), in the projections' dtype or autocast's; positions are turned in fp32.

        Keys and values are expanded from the latents for training and for a prompt; tokens that follow stored ones
        attend in latent space instead (absorbed), where nothing of the past is expanded again.

        Args:
            rotary: tables for these positions, by `moe.layers.rope.rotary_tables`; None for positions 0 … S-1.
            mask: (B or 1, 1, S, keys) bool, true where a query may attend; None for all earlier tokens and itself.
            memory: where to store these tokens' latents and rotary keys, and find those of earlier ones.
        """
        batch, length, _ = x_BSD.shape
        x_BSD = as_multiplied(x_BSD)
        if rotary is None:
            positions = torch.arange(length, device=x_BSD.device)[None]
            rotary = rotary_tables(positions, self.rotary_dim, self.rope_theta, self.stretching)
        query = self._query(x_BSD).view(batch, length, self.num_heads, -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BSD).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)
        query = apply_rotary(query, rotary, interleaved=True)
        k_rope = apply_rotary(k_rope.unsqueeze(2), rotary, interleaved=True).squeeze(2)
        if memory is not None:
            end = memory.start + length
            memory.store[:, memory.start : end] = torch.cat((latent, k_rope), dim=-1)
        if memory is not None and memory.start > 0:
            mixed = self._attend_absorbed(query, memory.store[:, :end], mask)
        else:
            mixed = self._attend_expanded(query, latent, k_rope, mask)
        return self.o_proj(mixed.reshape(batch, length, -1))

    def _attend_expanded(self, query: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over keys and values of every head; (B, S, H, v_head_dim)."""
        expanded = self.kv_b_proj(latent).view(*query.shape[:3], -1)
        if query.device.type == "cpu" and mask is None:
            return causal_attention(query, expanded, k_rope, self.softmax_scale)
        k_nope, value = expanded.split((self.qk_nope_head_dim, self.v_head_dim), dim=-1)
        key = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)), dim=-1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if query.device.type == "cpu":
            # torch's fused attention takes one width only; unfused, it keeps every score and takes twice as long
            wider = self.v_head_dim - query.shape[-1]
            if wider > 0:
                query, key = F.pad(query, (0, wider)), F.pad(key, (0, wider))
            value = F.pad(value, (0, max(0, -wider)))  # even by 0: the copy lets go of the keys that lie beside it
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return mixed[..., : self.v_head_dim].transpose(1, 2)

    def _attend_absorbed(self, query: Tensor, stored: Tensor, mask: Tensor | None) -> Tensor:
        """The same over stored latents (B, keys, C + R); (B, S, H, v_head_dim).

        A key is W_UK c, so q . (W_UK c) = (W_UK^T q) . c: the query goes into latent space once, and all heads read
        the one stored row. Likewise the values are mixed as latents and expanded once, after mixing.
        """
        batch, length, heads, _ = query.shape
        q_nope, q_rope = query.transpose(1, 2).split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        up = self.kv_b_proj.weight.view(heads, -1, self.kv_lora_rank)
        up_key, up_value = up.split((self.qk_nope_head_dim, self.v_head_dim), dim=1)
        query = torch.cat((torch.matmul(q_nope, up_key.to(q_nope.dtype)), q_rope), dim=-1)
        # the long operand comes first: for few queries a CPU's matrix product is two to four times faster that way
        scores = torch.matmul(stored, query.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
        scores = scores.float().reshape(batch, heads, length, -1) * self.softmax_scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1).to(stored.dtype)
        latents = stored[..., : self.kv_lora_rank].transpose(1, 2)
        mixed = torch.matmul(latents, weights.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
        mixed = mixed.reshape(batch, heads, length, self.kv_lora_rank)
        return torch.matmul(mixed, up_value.transpose(1, 2).to(mixed.dtype)).transpose(1, 2)

    def _query(self, x_BSD: Tensor) -> Tensor:
        if self.q_lora_rank is None:
            return self.q_proj(x_BSD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
