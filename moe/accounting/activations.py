"""What autograd keeps of a micro-batch between forward and backward pass, tensor by tensor.

As torch's CPU kernels and `moe_kernels`' torch backend keep it; a test holds the sum against what is allocated. Every
method gives bytes. `Part` is a micro-batch in front of one layer, `MicroBatch` the way through all of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe.accounting.counts import attention_matrices

if TYPE_CHECKING:
    from moe.config.architecture import Architecture

__all__ = ["BF16", "FP32", "MicroBatch"]

FP32, BF16, INT64, INT32 = 4, 2, 8, 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """`sequences` x `length` tokens; bytes of a number in matrix products and in the residual stream.

    Under autocast products are bf16, while the residual stream stays fp32 like the embedding it starts from.
    """

    config: "Architecture"
    sequences: int
    length: int
    compute: int
    stream: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def layer(self, moe: bool) -> int:
        """A decoder layer: two norms, whose inputs are the residual stream, attention, feed-forward."""
        attention = self._latent() if self.config.attention == "mla" else self._grouped()
        feed_forward = self._mixture() if moe else self._swiglu(self.config.intermediate_size)
        return 2 * self.norm(self.config.hidden_size, self.stream) + attention + feed_forward

    def routes(self, moe: bool) -> int:
        """What a recomputed layer keeps besides its input: all its router decided, loads of the experts too."""
        return self._choice() + self._choices * INT32 if moe else 0

    def head(self) -> int:
        """The loss keeps two gradients, of hidden states and of its matrix, and how many labels it is a mean over."""
        hidden = self.config.hidden_size
        return self.tokens * hidden * self.compute + self.config.vocab_size * hidden * FP32 + INT64

    def norm(self, width: int, given: int, *, groups: int = 1) -> int:
        """RMSNorm of `groups` times `width` numbers a token, given in `given` bytes each.

        It keeps its input, and a reciprocal root in fp32.
        """
        return self.tokens * groups * (width * given + FP32)

    def copied(self, matrices: int) -> int:
        """Weights that autocast casts: one copy a forward pass, kept by the linear layers."""
        return matrices * BF16 if self.compute == BF16 else 0

    def _read(self) -> int:
        """A normed input, cast once for all the linear layers that read it."""
        return self.tokens * self.config.hidden_size * self.compute

    def _latent(self) -> int:
        config = self.config
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        kept = self._read()  # q_proj or q_a_proj, kv_a_proj_with_mqa
        if config.q_lora_rank is not None:
            kept += self.norm(config.q_lora_rank, self.compute)  # q_a_layernorm
            kept += self.tokens * config.q_lora_rank * self.compute  # its output, read by q_b_proj
        kept += self.norm(rank, self.compute)  # kv_a_layernorm
        # it reads the latent in place, so the rotary key that lies beside it is kept as well
        kept += self.tokens * config.qk_rope_head_dim * self.compute
        kept += self.tokens * rank * self.compute  # its output, read by kv_b_proj
        # queries, kv_b_proj's output, turned keys, and what is mixed, which o_proj reads (`moe.layers.causal`)
        a_head = config.qk_head_dim + (config.qk_nope_head_dim + config.value_head_dim) + config.value_head_dim
        kept += self.tokens * (heads * a_head + config.qk_rope_head_dim) * self.compute
        return kept + self.copied(attention_matrices(config))

    def _grouped(self) -> int:
        config = self.config
        heads, width = config.num_attention_heads, config.qk_head_dim
        kv_heads = config.num_key_value_heads or heads
        kept = self._read()  # q_proj, k_proj, v_proj
        if config.qk_norm == "head":
            kept += self.norm(width, self.compute, groups=heads) + self.norm(width, self.compute, groups=kv_heads)
        elif config.qk_norm == "full":
            kept += self.norm(heads * width, self.compute) + self.norm(kv_heads * width, self.compute)
        if config.clip_qkv is not None:
            kept += self.tokens * (heads + 2 * kv_heads) * width * self.compute  # all three before clamping
        return kept + self._attend(kv_heads) + self.copied(attention_matrices(config))

    def _attend(self, kv_heads: int) -> int:
        """torch's fused attention's inputs and output, which o_proj reads."""
        heads, width = self.config.num_attention_heads, self.config.qk_head_dim
        return self.tokens * ((2 * heads + 2 * kv_heads) * width * self.compute + heads * FP32)  # and a logsumexp

    def _swiglu(self, width: int) -> int:
        """A dense feed-forward: input; gate, silu(gate), up and the product of the last two."""
        matrices = 3 * self.config.hidden_size * width
        return self._read() + self.tokens * 4 * width * self.compute + self.copied(matrices)

    def _mixture(self) -> int:
        """Router, routed experts (`moe_kernels.expert_mlp`), shared experts."""
        config = self.config
        top_k, width = config.num_experts_per_tok, config.moe_intermediate_size
        kept = self.tokens * config.hidden_size * FP32  # the router's x
        if self.compute == BF16:
            kept += self.tokens * config.hidden_size * BF16  # the experts' x; in fp32 it is the router's
        kept += self._choice()
        kept += self.tokens * top_k * 2 * width * self.compute  # h: gate and up of every chosen expert
        kept += self.tokens * top_k * INT64 + (config.n_routed_experts + 1) * INT32  # order, offsets
        if config.n_shared_experts:
            kept += self._swiglu(config.n_shared_experts * width) - self._read()  # its x is the experts'
        return kept

    def _choice(self) -> int:
        """Of every token: index and weight of its experts, and all scores."""
        return self.tokens * (self.config.num_experts_per_tok * (INT64 + FP32) + self._choices * FP32)

    @property
    def _choices(self) -> int:
        """What a router chooses from: experts, and null ones."""
        return self.config.n_routed_experts + self.config.n_null_experts


@dataclass(frozen=True)
class MicroBatch:
    """`sequences` of `length` tokens through a whole model; the `recomputed` first layers keep little.

    compute: bytes of a number in matrix products.
    """

    config: "Architecture"
    sequences: int
    length: int
    compute: int
    recomputed: int

    def activations(self) -> int:
        """Everything."""
        config, main = self.config, self._part()
        kept = main.tokens * INT64  # token ids, for the embedding's gradient
        kept += 2 * self.length * (config.rotary_dim // 2) * FP32  # cosines and sines, one table for all layers
        for layer in range(config.num_hidden_layers):
            moe = config.is_moe_layer(layer)
            if layer < self.recomputed:
                kept += main.tokens * config.hidden_size * FP32 + main.routes(moe)
            else:
                kept += main.layer(moe)
        kept += main.norm(config.hidden_size, FP32) + main.head()
        return kept + sum(self._module(number) for number in range(config.num_nextn_predict_layers))

    def _module(self, number: int) -> int:
        """Multi-token prediction module `number` (from 0) and its loss."""
        config, hidden = self.config, self.config.hidden_size
        part = self._part(number + 1)
        moe = config.is_moe_layer(config.num_hidden_layers)
        last = self.sequences * hidden * FP32  # of the states it starts from: not used, but in the same tensor
        if config.num_hidden_layers + number < self.recomputed:
            embedded, states = part.tokens * hidden * FP32, part.tokens * hidden * FP32 + last
            return embedded + states + part.routes(moe) + part.head()
        kept = 2 * part.norm(hidden, FP32) + last  # enorm, hnorm
        kept += part.tokens * 2 * hidden * self.compute + part.copied(2 * hidden * hidden)  # eh_proj
        return kept + part.layer(moe) + part.norm(hidden, part.stream) + part.head()

    def _part(self, ahead: int = 0) -> Part:
        """What a layer sees; one of a module `ahead` positions ahead, which the last positions have no token for."""
        return Part(
            config=self.config,
            sequences=self.sequences,
            length=self.length - ahead,
            compute=self.compute,
            stream=FP32,
        )
