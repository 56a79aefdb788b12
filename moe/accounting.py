"""Parameters and floating-point operations of a configuration, by arithmetic: nothing is allocated, no torch.

Conventions. A multiply-add is two operations. *Active* parameters are those one token's forward pass multiplies with:
chosen and shared experts, routers with their selection bias, attention, norms and the output head, but not the input
embedding (a look-up). FLOPs per token of training follow Kaplan et
al. (arXiv:2001.08361): 6 x active matrix parameters, plus 6 x layers x heads x (qk + v width) x half the sequence for
causal attention scores and their use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.config.architecture import Architecture

__all__ = ["flops_per_token", "num_parameters", "parameters", "twin_residual"]


def parameters(config: "Architecture", *, active: bool = False) -> dict[str, int]:
    """Parameters by part: embedding, attention, dense_ffn, shared_experts, routed_experts, router, norms, head.

    With `active=True` only what one token passes; the input embedding then counts 0, a tied matrix counts as head.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(layers))
    experts = config.num_experts_per_tok if active else config.n_routed_experts
    matrix = config.vocab_size * hidden
    tied = config.tie_word_embeddings
    return {
        "embedding": 0 if active else matrix,
        "attention": layers * _attention(config),
        "dense_ffn": (layers - moe_layers) * 3 * hidden * config.intermediate_size,
        "shared_experts": moe_layers * 3 * hidden * config.n_shared_experts * config.moe_intermediate_size,
        "routed_experts": moe_layers * 3 * hidden * experts * config.moe_intermediate_size,
        "router": moe_layers * config.n_routed_experts * (hidden + int(config.has_expert_bias)),
        "norms": (2 * layers + 1) * hidden,
        "head": 0 if tied and not active else matrix,
    }


def num_parameters(config: "Architecture", *, active: bool = False) -> int:
    """Sum of `parameters`."""
    return sum(parameters(config, active=active).values())


def flops_per_token(config: "Architecture", seq_len: int) -> float:
    """Operations of one training step (forward and backward) per token, in sequences of `seq_len` tokens."""
    heads_width = config.num_attention_heads * (config.qk_head_dim + config.value_head_dim)
    attention = 6 * config.num_hidden_layers * heads_width * seq_len / 2
    return 6 * num_parameters(config, active=True) + attention


def twin_residual(config: "Architecture", twin: "Architecture", *, active: bool = True) -> float:
    """How far the twin's parameters are from the model's, as a share of the model's (signed)."""
    return num_parameters(twin, active=active) / num_parameters(config, active=active) - 1


def _attention(config: "Architecture") -> int:
    """Parameters of one layer's attention, its inner norms and biases included."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    bias = int(config.attention_bias)
    if config.attention == "mla":
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        q_width = heads * config.qk_head_dim
        q_rank = config.q_lora_rank
        query = hidden * q_width if q_rank is None else (hidden + bias + 1 + q_width) * q_rank
        down = (hidden + bias) * (rank + rope) + rank
        up = rank * heads * (config.qk_nope_head_dim + config.value_head_dim)
        output = (heads * config.value_head_dim + bias) * hidden
        return query + down + up + output
    width = config.qk_head_dim
    kv_width = (config.num_key_value_heads or heads) * width
    norms = {"none": 0, "head": 2 * width, "full": heads * width + kv_width}[config.qk_norm]
    return (hidden + bias) * (heads * width + 2 * kv_width) + (heads * width + bias) * hidden + norms
