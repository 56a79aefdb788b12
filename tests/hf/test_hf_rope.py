"""Rotary positions: those of released models, and the ways a config.json has of saying them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe.hf
from moe import Transformer
from moe.hf.settings import config_from_hub
from moe.layers.decoder import stretching_of

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers (extra `hf`)")

Draw = Callable[..., Transformer]
IDS = torch.arange(11)[None]

LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
RELEASED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": dict(**LLAMA3, factor=8.0, rope_theta=5e5),
    "Llama-3.2-1B": dict(**LLAMA3, factor=32.0, rope_theta=5e5),
    "vicuna-7b-v1.5-16k": dict(rope_type="linear", factor=4.0, rope_theta=1e4),
    "Qwen3-8B": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, rope_theta=1e6),
}


@pytest.mark.parametrize("model", RELEASED)
def test_frequencies_of_released_models(model: str) -> None:
    """Heads of 128 and contexts of thousands, which small models do not have; to fp32's last digits."""
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=dict(RELEASED[model])
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = config_from_hub(config.to_dict())[1]
    stretching = stretching_of(ours)
    assert stretching is not None
    plain = ours.rope_theta ** (-torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    torch.testing.assert_close(stretching.slow_down(plain, 128, ours.rope_theta), theirs.inv_freq, atol=0, rtol=1e-6)
    assert stretching.table_scale == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(("family", "kind"), [("deepseek_v3", "yarn"), ("llama", "llama3"), ("mixtral", "linear")])
def test_rope_as_it_was_written_before(family: str, kind: str, draw: Draw, tmp_path: Path) -> None:
    """rope_theta and rope_scaling, with `type` for `rope_type`, as in most files on the hub."""
    ours = draw(family, rope_type=kind, rope_factor=4.0, rope_theta=5e5)
    moe.hf.save(ours, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    rope["type"] = rope.pop("rope_type")
    config.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    file.write_text(json.dumps(config))
    assert torch.equal(moe.hf.load(tmp_path)(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_where_the_context_before_is_said(
    kind: str, draw: Draw, transformers_load: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """transformers takes it from beside the object, then from the object, then from the longest sequence."""
    moe.hf.save(draw("llama", rope_type=kind, rope_factor=4.0, rope_original_max_position_embeddings=8), tmp_path)
    file = tmp_path / "config.json"
    for beside, within, taken in ((4, 8, 4), (None, 8, 8), (None, None, 64)):
        config = json.loads(file.read_text())
        for where, value in ((config, beside), (config["rope_parameters"], within)):
            where.pop("original_max_position_embeddings", None)
            where.update({} if value is None else {"original_max_position_embeddings": value})
        file.write_text(json.dumps(config))
        ours = moe.hf.load(tmp_path)
        assert ours.config.rope_original_max_position_embeddings == taken
        torch.testing.assert_close(transformers_load(tmp_path)(IDS).logits, ours(IDS).logits, atol=1e-4, rtol=0)


def test_stretching_by_nothing(draw: Draw, tmp_path: Path) -> None:
    """A factor of 1 is plain positions, whatever it is called."""
    ours = draw("llama", rope_type="default", rope_factor=1.0)
    moe.hf.save(ours, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"].update(rope_type="yarn", factor=1.0)
    file.write_text(json.dumps(config))
    assert moe.hf.load(tmp_path).config.rope_type == "default"
