"""Rotary positions in config.json, both ways.

transformers 5 writes one object `rope_parameters`; before it were `rope_theta` and `rope_scaling`, still in most files.
"""

import math
from collections.abc import Mapping
from typing import Any

from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.layers.rope import Yarn

__all__ = ["rope_from_hub", "rope_to_hub"]


def rope_from_hub(stored: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """Our `rope_*` fields. Raises ConfigError for a kind of positions other than plain and YaRN."""
    where = "rope_scaling" if stored.get("rope_scaling") else "rope_parameters"
    rope = stored.get(where) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}={rope!r} must be an object")
    theta = rope.get("rope_theta", stored.get("rope_theta"))
    fields = {"rope_theta": default_theta if theta is None else theta}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{where}.rope_type={kind!r} is not supported: positions are plain ('default') or 'yarn'")
    partial = rope.get("partial_rotary_factor", stored.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor={partial!r} is not supported: positions turn whole heads")
    return fields if kind == "default" else {**fields, **_yarn_from_hub(stored, rope, where)}


def _yarn_from_hub(stored: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    if rope.get("truncate") is False:
        raise ConfigError(f"{where}.truncate=False is not supported: YaRN's bounds are rounded to whole pairs")
    longest = stored.get("max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or longest
    factor = rope.get("factor") or (longest / original if longest and original else None)
    if not factor or not original:
        raise ConfigError(f"{where}.factor is missing: YaRN needs it")
    yarn = {
        "factor": float(factor),
        "original_max_position_embeddings": original,
        "beta_fast": float(rope.get("beta_fast") or 32.0),
        "beta_slow": float(rope.get("beta_slow") or 1.0),
        "mscale": float(rope.get("mscale") or 0.0),
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
    }
    given, usual = rope.get("attention_factor"), Yarn(**yarn).table_scale
    if given is not None and not math.isclose(given, usual, rel_tol=1e-6):
        raise ConfigError(
            f"{where}.attention_factor={given!r} is not supported: it must be what factor and mscale give, {usual:.6g}"
        )
    return {f"rope_{name}": value for name, value in yarn.items()}


def rope_to_hub(config: ModelConfig) -> dict[str, Any]:
    """The value of `rope_parameters`."""
    if config.rope_factor == 1.0:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    yarn = {name: getattr(config, f"rope_{name}") for name in names}
    # 0 is "not given" for us and for transformers; other readers take what is written as a number
    scales = {name: getattr(config, f"rope_{name}") for name in ("mscale", "mscale_all_dim")}
    given = {name: value for name, value in scales.items() if value}
    return {"rope_type": "yarn", "rope_theta": config.rope_theta, **yarn, **given}
