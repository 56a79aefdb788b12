"""The dense model an MoE is compared with."""

from typing import Literal, TypeVar

from moe import accounting
from moe.config.architecture import Architecture
from moe.errors import ConfigError

__all__ = ["dense_twin"]

_WIDTH_MULTIPLE = 16

_Config = TypeVar("_Config", bound=Architecture)


def dense_twin(config: _Config, match: Literal["active", "total"]) -> _Config:
    """A copy of `config` with every layer dense; see `ModelConfig.dense_twin`."""
    if match not in ("active", "total"):
        raise ConfigError(f"match={match!r} must be 'active' or 'total'")
    layers = config.num_hidden_layers
    widths = [config.active_width if config.is_moe_layer(i) else config.intermediate_size for i in range(layers)]
    width = max(_WIDTH_MULTIPLE, _round(sum(widths) / layers, _WIDTH_MULTIPLE))
    dense = config.replace(
        intermediate_size=width,
        n_routed_experts=0,
        n_shared_experts=0,
        n_null_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    )
    if match == "active":
        return dense
    return _grow(dense, accounting.num_parameters(config.replace(num_nextn_predict_layers=0)))


def _grow(dense: _Config, target: int) -> _Config:
    """Scale depth, hidden size, heads and width of `dense` by one factor, so the parameters are nearest `target`.

    Head widths and latent ranks stay; hidden size moves in whole heads so that any head layout stays valid. The SwiGLU
    width then takes up what whole heads and whole layers left over.
    """
    unit = dense.hidden_size // dense.num_attention_heads
    best = dense
    for extra in range(0, 64 * dense.num_attention_heads):
        heads = dense.num_attention_heads + extra
        factor = heads / dense.num_attention_heads
        candidate = dense.replace(
            num_hidden_layers=max(1, round(dense.num_hidden_layers * factor)),
            num_attention_heads=heads,
            num_key_value_heads=None if dense.num_key_value_heads is None else heads,
            hidden_size=max(1, unit) * heads,
            intermediate_size=_round(dense.intermediate_size * factor, _WIDTH_MULTIPLE),
        )
        if abs(accounting.num_parameters(candidate) - target) < abs(accounting.num_parameters(best) - target):
            best = candidate
        if accounting.num_parameters(candidate) > target:
            break
    missing = target - accounting.num_parameters(best)
    width = best.intermediate_size + missing / (3 * best.hidden_size * best.num_hidden_layers)
    return best.replace(intermediate_size=_round(width, _WIDTH_MULTIPLE))


def _round(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
