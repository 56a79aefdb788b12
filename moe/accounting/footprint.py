"""Bytes of training and decoding: weights, gradients, moments, what a forward pass keeps; the decoding cache."""

from typing import TYPE_CHECKING, Literal

from moe.accounting.activations import BF16, FP32, MicroBatch
from moe.accounting.counts import hidden_matrices, num_parameters

if TYPE_CHECKING:
    from moe.config.architecture import Architecture

__all__ = ["cache_bytes_per_token", "memory"]


def memory(
    config: "Architecture",
    *,
    micro_batch_size: int,
    seq_len: int,
    precision: Literal["fp32", "bf16", "fp8"] = "fp32",
    recompute_layers: int = 0,
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> dict[str, int]:
    """Bytes one process of the trainer holds between a forward and its backward pass, by part; they add up.

    weights: fp32 in every precision (bf16 and fp8 are autocast over them), selection biases with them.
    gradients: fp32.
    optimizer: AdamW's two moments, fp32; one momentum for what Muon trains.
    activations: what autograd keeps of one micro-batch, on the torch backend on a CPU. Autocast's copies of weights are
        among it, and the output head's gradients, which it works out in the forward pass.

    Under fp8 that is what bf16 keeps: experts quantise what they multiply, and drop it. The Triton backend keeps the
    same of the routed experts. What else a GPU's kernels keep is unmeasured. Not counted: document masks, balance
    losses, what an operation needs while it runs (1 GB in the output head), and what the allocator rounds up.

    Args:
        precision: as `train.precision`.
        recompute_layers: as `train.recompute_layers`: this many first layers keep only input and routing decisions.
        optimizer: as `optim.name`.
    """
    numbers = num_parameters(config)
    trained = numbers - _selection_biases(config)
    single = hidden_matrices(config) if optimizer == "muon" else 0
    batch = MicroBatch(
        config, micro_batch_size, seq_len, compute=FP32 if precision == "fp32" else BF16, recomputed=recompute_layers
    )
    return {
        "weights": numbers * FP32,
        "gradients": trained * FP32,
        "optimizer": (2 * trained - single) * FP32,
        "activations": batch.activations(),
    }


def cache_bytes_per_token(config: "Architecture", dtype_bytes: int) -> int:
    """Bytes a decoding cache holds for one token of one sequence, all layers, at `dtype_bytes` a number.

    Latent attention: the latent and the shared rotary key. Grouped-query attention: keys and values.
    """
    if config.attention == "mla":
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        numbers = 2 * (config.num_key_value_heads or config.num_attention_heads) * config.qk_head_dim
    return config.num_hidden_layers * numbers * dtype_bytes


def _selection_biases(config: "Architecture") -> int:
    """Numbers in the routers' selection biases: buffers, which have no gradient."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    choices = config.n_routed_experts + config.n_null_experts
    return choices * sum(config.is_moe_layer(n) for n in layers) * int(config.has_expert_bias)
