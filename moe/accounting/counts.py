"""Parameters and floating-point operations of a configuration.

Conventions. A multiply-add is two operations. *Active* parameters are those one token's forward pass multiplies with:
chosen and shared experts (where choices may be null, as many as are real in the mean at even load), routers with their
selection bias, attention, norms and the output head, but neither the input embedding (a look-up) nor multi-token
prediction, which only training runs. FLOPs per token of training follow Kaplan et al. (arXiv:2001.08361): 6 x active
parameters, plus 6 x layers x heads x (qk + v width) x half the sequence for causal attention scores and their use; both
with the multi-token prediction modules, each of which passes the output head once more.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.config.architecture import Architecture

__all__ = ["attention_matrices", "flops_per_token", "hidden_matrices", "num_parameters", "parameters", "twin_residual"]

_FEED_FORWARDS = ("dense_ffn", "shared_experts", "routed_experts")


def parameters(config: "Architecture", *, active: bool = False) -> dict[str, int]:
    """Parameters by part: embedding, attention, dense_ffn, shared_experts, routed_experts, router, norms, head, mtp.

    With `active=True` only what one token passes; embedding and mtp then count 0, a tied matrix counts as head. `mtp`
    is what the modules have of their own: embedding and head are the model's.
    """
    layers = config.num_hidden_layers
    moe_layers = max(0, layers - config.first_k_dense_replace) if config.is_moe else 0
    dense, mixture = _layer(config, moe=False, active=active), _layer(config, moe=True, active=active)
    matrix = config.vocab_size * config.hidden_size
    in_layers = {part: (layers - moe_layers) * dense[part] + moe_layers * mixture[part] for part in dense}
    return {
        "embedding": 0 if active else matrix,
        **in_layers,
        "norms": in_layers["norms"] + config.hidden_size,
        "head": 0 if config.tie_word_embeddings and not active else matrix,
        "mtp": 0 if active else config.num_nextn_predict_layers * _mtp_module(config, active=False),
    }


def num_parameters(config: "Architecture", *, active: bool = False) -> int:
    """Sum of `parameters`."""
    return sum(parameters(config, active=active).values())


def flops_per_token(config: "Architecture", seq_len: int, computed_share: float | None = None) -> float:
    """Operations of one training step (forward and backward) per token, in sequences of `seq_len` tokens.

    computed_share: share of the experts chosen that were real, as measured (`router/computed_share`); None for what it
        is at even load, which without null experts is 1.
    """
    modules = config.num_nextn_predict_layers
    heads_width = config.num_attention_heads * (config.qk_head_dim + config.value_head_dim)
    attention = 6 * (config.num_hidden_layers + modules) * heads_width * seq_len / 2
    further = modules * (_mtp_module(config, active=True) + config.vocab_size * config.hidden_size)
    more = 0.0
    if computed_share is not None and config.is_moe:
        routed_layers = config.num_hidden_layers - config.first_k_dense_replace + modules
        experts = config.num_experts_per_tok * computed_share - config.mean_experts_per_tok
        more = routed_layers * experts * 3 * config.hidden_size * config.moe_intermediate_size
    return 6 * (num_parameters(config, active=True) + further + more) + attention


def twin_residual(config: "Architecture", twin: "Architecture", *, active: bool = True) -> float:
    """How far the twin's parameters are from the model's, as a share of the model's (signed); multi-token prediction,
    which a twin has none of, left out."""
    ours, theirs = (parameters(one, active=active) for one in (config, twin))
    return (sum(theirs.values()) - theirs["mtp"]) / (sum(ours.values()) - ours["mtp"]) - 1


def attention_matrices(config: "Architecture") -> int:
    """Parameters of the projections of one layer's attention, without biases and inner norms."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_width = heads * config.qk_head_dim
    output = heads * config.value_head_dim * hidden
    if config.attention == "mla":
        rank, q_rank = config.kv_lora_rank, config.q_lora_rank
        query = hidden * q_width if q_rank is None else (hidden + q_width) * q_rank
        up = rank * heads * (config.qk_nope_head_dim + config.value_head_dim)
        return query + hidden * (rank + config.qk_rope_head_dim) + up + output
    return hidden * (q_width + 2 * _kv_width(config)) + output


def hidden_matrices(config: "Architecture") -> int:
    """Parameters of the matrices between embedding and head, experts' and multi-token prediction's included.

    Routers are not among them. These are what Muon trains; see `moe.optim.roles`.
    """
    modules = config.num_nextn_predict_layers
    layers = range(config.num_hidden_layers + modules)
    total = modules * 2 * config.hidden_size**2
    for number in layers:
        parts = _layer(config, moe=config.is_moe_layer(number), active=False)
        total += attention_matrices(config) + sum(parts[part] for part in _FEED_FORWARDS)
    return total


def _layer(config: "Architecture", *, moe: bool, active: bool) -> dict[str, int]:
    """Parameters of one decoder layer by part."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    routed = 3 * hidden * (config.mean_experts_per_tok if active else config.n_routed_experts) * width
    choices = config.n_routed_experts + config.n_null_experts
    return {
        "attention": attention_matrices(config) + _attention_vectors(config),
        "dense_ffn": 0 if moe else 3 * hidden * config.intermediate_size,
        "shared_experts": 3 * hidden * config.n_shared_experts * width if moe else 0,
        "routed_experts": round(routed) if moe else 0,
        "router": choices * (hidden + int(config.has_expert_bias)) if moe else 0,
        "norms": 2 * hidden,
    }


def _mtp_module(config: "Architecture", *, active: bool) -> int:
    """Parameters of one multi-token prediction module: eh_proj, three norms, and a layer like the last."""
    hidden = config.hidden_size
    layer = _layer(config, moe=config.is_moe_layer(config.num_hidden_layers), active=active)
    return 2 * hidden * hidden + 3 * hidden + sum(layer.values())


def _attention_vectors(config: "Architecture") -> int:
    """Biases and inner norms of one layer's attention."""
    heads, bias = config.num_attention_heads, int(config.attention_bias)
    output = int(config.has_output_bias) * config.hidden_size
    if config.attention == "mla":
        rank, q_rank = config.kv_lora_rank, config.q_lora_rank or 0
        return (1 + bias) * q_rank + rank + bias * (rank + config.qk_rope_head_dim) + output
    width = config.qk_head_dim
    q_width, kv_width = heads * width, _kv_width(config)
    norms = {"none": 0, "head": 2 * width, "full": q_width + kv_width}[config.qk_norm]
    return bias * (q_width + 2 * kv_width) + norms + output


def _kv_width(config: "Architecture") -> int:
    """Width of all key heads together, which is that of the value heads (gqa)."""
    return (config.num_key_value_heads or config.num_attention_heads) * config.qk_head_dim
