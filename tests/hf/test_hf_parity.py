"""Every family against transformers' own class of the same weights, on random small models, in fp32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import moe.hf
from moe import Transformer

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers (extra `hf`)")

CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _ids(model: Transformer, *shape: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(7))


def test_logits_loss_and_gradients_agree(pair: Any, hub_name: Callable[[str], str]) -> None:
    """Logits within 1e-4, the loss within 1e-5, each gradient within 2e-5 of its tensor's largest entry.

    The floor, 1e-7 of the model's largest gradient, is for gradients that are zero but for rounding: those of a router
    that gives its only expert the weight 1.
    """
    ours, theirs = pair.ours, pair.theirs
    assert type(theirs).__name__ == CLASSES[pair.family]
    ids = _ids(ours, 2, 19)
    labels = ids.clone()
    labels[0, 5:9] = -100
    mine, other = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert (mine.logits - other.logits).abs().max() <= 1e-4
    assert (mine.loss - other.loss).abs() <= 1e-5
    mine.loss.backward()
    other.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    floor = 1e-7 * max(gradient.abs().max() for gradient in gradients.values())
    compared = set()
    for name, parameter in ours.named_parameters():
        expected = gradients[hub_name(name)]
        compared.add(hub_name(name))
        assert (parameter.grad - expected).abs().max() <= 2e-5 * expected.abs().max() + floor, name
    assert compared == set(gradients)


@torch.no_grad()
def test_greedy_text_agrees(pair: Any) -> None:
    """transformers' cached generation and our full forwards choose the same tokens."""
    ids = _ids(pair.ours, 2, 7)
    written = pair.theirs.generate(ids, max_new_tokens=8, do_sample=False)
    for _ in range(8):
        ids = torch.cat((ids, pair.ours(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, ids)


@torch.no_grad()
def test_what_transformers_saved_loads(pair: Any, tmp_path: Path) -> None:
    """Their directory gives our weights back, bit by bit, and saving it again gives theirs, tensor by tensor."""
    pair.theirs.save_pretrained(tmp_path / "theirs")
    ours = moe.hf.load(tmp_path / "theirs")
    state = ours.state_dict()
    assert state.keys() == pair.ours.state_dict().keys()
    for name, tensor in pair.ours.state_dict().items():
        assert torch.equal(state[name], tensor), name
    ids = _ids(ours, 2, 11)
    assert torch.equal(ours(ids).logits, pair.ours(ids).logits)
    moe.hf.save(ours, tmp_path / "again")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("theirs", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_dense_latent_attention_is_deepseek_v3(
    draw: Callable[..., Transformer], transformers_load: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """The dense twin of a DeepSeek-V3 model exports as that class with every layer dense, and comes back dense."""
    ours = draw("deepseek_v3", 1)
    dense = Transformer(ours.config.dense_twin()).eval()
    moe.hf.save(dense, tmp_path)
    theirs = transformers_load(tmp_path)
    ids = _ids(dense, 2, 9)
    torch.testing.assert_close(theirs(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)
    again = moe.hf.load(tmp_path)
    assert not again.config.is_moe
    assert torch.equal(again(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")  # transformers makes width 0
def test_no_shared_experts(
    family: str, draw: Callable[..., Transformer], transformers_load: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """transformers has shared experts always: of width 0 they add nothing, and none is missing."""
    ours = draw(family, 3, n_shared_experts=0)
    moe.hf.save(ours, tmp_path)
    ids = _ids(ours, 2, 9)
    torch.testing.assert_close(transformers_load(tmp_path)(ids).logits, ours(ids).logits, atol=1e-4, rtol=0)
    assert torch.equal(moe.hf.load(tmp_path)(ids).logits, ours(ids).logits)


def test_config_comes_back(pair: Any) -> None:
    """Our configuration survives the directory, but for fields that mean nothing in the family."""
    before, after = pair.ours.config.to_dict(), moe.hf.load(pair.directory).config.to_dict()
    different = {name for name in before if before[name] != after[name]}
    allowed = {"head_dim", "num_key_value_heads"}  # none is written out as the number it stands for
    if pair.family in ("mixtral", "olmoe"):
        allowed.add("intermediate_size")  # no dense layer has it
    assert different <= allowed
    stored = json.loads((pair.directory / "config.json").read_text())
    assert stored["eos_token_id"] is None
    assert 0.0 not in stored["rope_parameters"].values()  # no mscale rather than one of 0
    assert stored["num_hidden_layers"] == pair.ours.config.num_hidden_layers
