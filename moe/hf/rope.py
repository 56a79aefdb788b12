"""Rotary positions in config.json, both ways.

transformers 5 writes one object `rope_parameters`; before it were `rope_theta` and `rope_scaling`, still in most files.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.layers.rope import STRETCHINGS

__all__ = ["rope_from_hub", "rope_to_hub"]


def rope_from_hub(stored: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """Our `rope_*` fields. Raises ConfigError for a kind of positions we do not have."""
    where = "rope_scaling" if stored.get("rope_scaling") else "rope_parameters"
    rope = stored.get(where) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}={rope!r} must be an object")
    theta = rope.get("rope_theta", stored.get("rope_theta"))
    fields = {"rope_theta": default_theta if theta is None else theta}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *STRETCHINGS):
        raise ConfigError(f"{where}.rope_type={kind!r} is not supported: only default, {', '.join(STRETCHINGS)} are")
    partial = rope.get("partial_rotary_factor", stored.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor={partial!r} is not supported: positions turn whole heads")
    return fields if kind == "default" else {**fields, **_stretching_from_hub(stored, rope, where, kind)}


def _stretching_from_hub(stored: Mapping[str, Any], rope: Mapping[str, Any], where: str, kind: str) -> dict[str, Any]:
    _refuse_what_ours_lacks(rope, where, kind)
    longest = stored.get("max_position_embeddings")
    # transformers reads the context before stretching beside the object first, then in it
    original = stored.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
    said = {**rope, "original_max_position_embeddings": original}
    if kind == "yarn" and not said.get("factor") and longest and original:
        said["factor"] = longest / original
    values: dict[str, Any] = {}
    for field in dataclasses.fields(STRETCHINGS[kind]):
        if said.get(field.name):  # 0 and null are "not given", as transformers takes them
            values[field.name] = original if field.type is int else float(said[field.name])
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}.{field.name} is missing: rope_type {kind!r} needs it")
    given, usual = rope.get("attention_factor"), STRETCHINGS[kind](**values).table_scale
    if kind == "yarn" and given is not None and not math.isclose(given, usual, rel_tol=1e-6):
        raise ConfigError(
            f"{where}.attention_factor={given!r} is not supported: it must be what factor and mscale give, {usual:.6g}"
        )
    if values["factor"] == 1.0:
        return {}  # stretched by nothing
    return {"rope_type": kind, **{f"rope_{name}": value for name, value in values.items()}}


def _refuse_what_ours_lacks(rope: Mapping[str, Any], where: str, kind: str) -> None:
    if kind == "yarn" and rope.get("truncate") is False:
        raise ConfigError(f"{where}.truncate=False is not supported: YaRN's bounds are rounded to whole pairs")
    if kind != "yarn" and rope.get("mscale_all_dim"):
        # in transformers it sharpens DeepSeek's softmax under any rope_type but default
        raise ConfigError(
            f"{where}.mscale_all_dim={rope['mscale_all_dim']!r} is not supported for rope_type {kind!r}: only 'yarn'"
        )


def rope_to_hub(config: ModelConfig) -> dict[str, Any]:
    """The value of `rope_parameters`."""
    plain = {"rope_type": config.rope_type, "rope_theta": config.rope_theta}
    if config.rope_type == "default":
        return plain
    names = [field.name for field in dataclasses.fields(STRETCHINGS[config.rope_type])]
    values = {name: getattr(config, f"rope_{name}") for name in names}
    # 0 is "not given" for us and for transformers; other readers take what is written as a number
    return {**plain, **{name: value for name, value in values.items() if value}}
