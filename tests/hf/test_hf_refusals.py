"""What cannot be computed is refused in one sentence that names the field or the tensor; nothing is ignored."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe.hf
from moe import Transformer
from moe.errors import CheckpointError, ConfigError

Draw = Callable[..., Transformer]

CONFIG_JSON = [
    ("llama", {"model_type": "gpt_oss"}, "model_type='gpt_oss' is not supported; supported are deepseek_v3"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported for llama: only 'silu' is"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
    ("llama", {"hidden_size": None}, "hidden_size=None must be"),
    ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers='2' must be"),
    ("llama", {"model_type": ["llama"]}, "config.json has a value of a wrong kind"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": "four"}}, "wrong kind: .*'four'"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' of config.json is not supported"),
    (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type='dynamic' is not supported: only default, linear, llama3, yarn are",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        "rope_parameters.high_freq_factor is missing: rope_type 'llama3' needs it",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        r"rope_low_freq_factor=4.0 must be below rope_high_freq_factor \(4\)",
    ),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing: rope_type 'linear'"),
    (
        "deepseek_v3",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 1.0}},
        "rope_parameters.mscale_all_dim=1.0 is not supported for rope_type 'linear': only 'yarn'",
    ),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": "yarn"}, "rope_parameters='yarn' must be an object"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=False is not"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
        "attention_factor=2.0 is not supported: it must be what factor and mscale give, 1.13863",
    ),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8'} is"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False is not supported"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads=1 is not supported"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
    ("mixtral", {"sliding_window": 32}, "sliding_window=32 is not supported"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window=32 is not supported"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers=\[2\] is not supported"),
    ("olmoe", {"clip_qkv": -8.0}, "clip_qkv=-8.0 must be above 0"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "is not supported: every layer has full attention"),
]


@pytest.mark.parametrize(("family", "changes", "sentence"), CONFIG_JSON)
def test_config_json(family: str, changes: dict[str, Any], sentence: str, draw: Draw, tmp_path: Path) -> None:
    """Each unsupported feature, by the name it has in config.json; one line."""
    moe.hf.save(draw(family), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConfigError, match=sentence) as caught:
        moe.hf.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 64}),  # as long as max_position_embeddings: never cuts anything off
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 32}),
        ("llama", {"attention_dropout": 0, "mlp_bias": None, "pretraining_tp": 2}),
        ("deepseek_v3", {"topk_method": "noaux_tc", "ep_size": 1, "aux_loss_alpha": 0.001}),
        ("deepseek_v2", {"moe_layer_freq": 1, "seq_aux": True}),
    ],
)
def test_harmless_fields_are_no_reason(family: str, changes: dict[str, Any], draw: Draw, tmp_path: Path) -> None:
    """Released files carry fields that change nothing in what is computed."""
    ours = draw(family)
    moe.hf.save(ours, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    ids = torch.arange(9)[None]
    assert torch.equal(moe.hf.load(tmp_path)(ids).logits, ours(ids).logits)


EXPORT = [
    (
        "mixtral",
        {"score_func": "sigmoid"},
        "model.score_func='sigmoid' cannot be exported: MixtralForCausalLM has only",
    ),
    ("mixtral", {"topk_method": "noaux_tc"}, "model.topk_method='noaux_tc' cannot be exported"),
    ("mixtral", {"n_shared_experts": 1}, "model.n_shared_experts=1 cannot be exported"),
    ("mixtral", {"routed_scaling_factor": 2.0}, "model.routed_scaling_factor=2.0 cannot be exported"),
    ("mixtral", {"norm_topk_prob": False}, "model.norm_topk_prob=False cannot be exported"),
    ("mixtral", {"attention_bias": True}, "model.attention_bias=True cannot be exported"),
    ("qwen3_moe", {"clip_qkv": 8.0}, "model.clip_qkv=8.0 cannot be exported: Qwen3MoeForCausalLM has only None"),
    ("llama", {"clip_qkv": 8.0}, "model.clip_qkv=8.0 cannot be exported: LlamaForCausalLM has only None"),
    ("olmoe", {"head_dim": 2}, "model.head_dim=2 cannot be exported"),
    ("llama", {"qk_norm": "full"}, "model.qk_norm='full' has no dense family"),
    ("llama", {"hidden_size": 26, "num_attention_heads": 4, "head_dim": 4}, "model.hidden_size=26 cannot be exported"),
    ("deepseek_v3", {"latent_norm_eps": 1e-5}, "model.latent_norm_eps=1e-05 cannot be exported: DeepseekV3ForCausalLM"),
    ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "model.topk_method='group_limited_greedy' cannot be"),
    (
        "deepseek_v3",
        {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
        "model.n_routed_experts=1 cannot be exported",
    ),
    ("deepseek_v2", {"norm_topk_prob": True}, "model.norm_topk_prob=True cannot be exported"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "model.topk_method='noaux_tc' cannot be exported"),
]


@pytest.mark.parametrize(("family", "changes", "sentence"), EXPORT)
def test_export(family: str, changes: dict[str, Any], sentence: str, draw: Draw, tmp_path: Path) -> None:
    """An architecture transformers has no class for is refused before anything is written."""
    model = draw(family, 2, **{"num_key_value_heads": None, **changes} if "head_dim" in changes else changes)
    with pytest.raises(ConfigError, match=sentence):
        moe.hf.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.0."
TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("llama", lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight, which its config.json implies"),
    ("mixtral", lambda t: t.pop(f"{LAYER}block_sparse_moe.experts.1.w3.weight"), "no tensor .*experts.1.w3.weight"),
    ("llama", lambda t: t.update(extra=torch.ones(1), more=torch.ones(1)), "unexpected tensor extra and 1 more"),
    (
        "llama",
        lambda t: t.update({f"{LAYER}mlp.up_proj.bias": torch.ones(3)}),
        "tensor model.layers.0.mlp.up_proj.bias",
    ),
    ("llama", lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight in .* has shape \(3,\)"),
    ("llama", lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(3)}), "unexpected tensor model.lay"),
    (
        "mixtral",
        lambda t: t.update({f"{LAYER}mlp.experts.gate_up_proj": torch.ones(2, 2, 2)}),
        "unexpected tensor model.layers.0.mlp.experts.gate_up_proj",
    ),
]


@pytest.mark.parametrize(("family", "change", "sentence"), TENSORS)
def test_tensors(
    family: str, change: Callable[[dict[str, torch.Tensor]], object], sentence: str, draw: Draw, tmp_path: Path
) -> None:
    """A tensor missing, left over, held twice or of another shape is named."""
    moe.hf.save(draw(family), tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=sentence):
        moe.hf.load(tmp_path)


def test_fp8_weights(draw: Draw, tmp_path: Path) -> None:
    """Scales beside the weights mean FP8, even where config.json does not say so."""
    moe.hf.save(draw("deepseek_v3"), tmp_path)
    _edit(tmp_path, lambda t: t.update({f"{LAYER}self_attn.o_proj.weight_scale_inv": torch.ones(1)}))
    with pytest.raises(ConfigError, match=r"o_proj.weight_scale_inv in .*: FP8 weights are not supported"):
        moe.hf.load(tmp_path)


def test_transformers_is_not_needed(draw: Draw, tmp_path: Path) -> None:
    """The base install reads and writes; transformers is only the oracle of the tests."""
    moe.hf.save(draw("qwen3_moe"), tmp_path / "one")
    code = "import sys; sys.modules['transformers'] = None; import moe.hf; moe.hf.save(moe.hf.load('one'), 'two')"
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)
    one, two = (load_file(tmp_path / place / "model.safetensors") for place in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_tied_head(draw: Draw, tmp_path: Path) -> None:
    """A second copy of the shared matrix is accepted when it is one."""
    ours = draw("llama", tie_word_embeddings=True)
    moe.hf.save(ours, tmp_path)
    _edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    again = moe.hf.load(tmp_path)
    assert again.lm_head.weight is again.embed_tokens.weight
    _edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .* differs from model.embed_tokens.weight"):
        moe.hf.load(tmp_path)


def test_predictors_not_stated_are_dropped_with_a_notice(draw: Draw, tmp_path: Path) -> None:
    """Layers after the last one that config.json does not speak of; the model is whole without them."""
    ours = draw("deepseek_v3")
    moe.hf.save(ours, tmp_path)
    after = f"model.layers.{ours.config.num_hidden_layers}."
    _edit(
        tmp_path, lambda t: t.update({f"{after}enorm.weight": torch.ones(3), f"{after}eh_proj.weight": torch.ones(3)})
    )
    with pytest.warns(UserWarning, match=r"dropped 1 multi-token prediction layer\(s\)") as caught:
        again = moe.hf.load(tmp_path)
    assert caught[0].filename == __file__  # it points at the caller
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, ours(ids).logits)


def test_rotary_frequencies_of_old_files_are_dropped(draw: Draw, tmp_path: Path) -> None:
    """They follow from the configuration."""
    moe.hf.save(draw("llama"), tmp_path)
    _edit(tmp_path, lambda t: t.update({f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    moe.hf.load(tmp_path)


def test_directories(draw: Draw, tmp_path: Path) -> None:
    """Not there, not JSON, ours, pickled, torn."""
    with pytest.raises(CheckpointError, match=r"config.json cannot be read \(No such file or directory\)"):
        moe.hf.load(tmp_path / "nowhere")
    ours = draw("llama")
    ours.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"load it with moe.Transformer.from_pretrained"):
        moe.hf.load(tmp_path / "ours")
    hub = tmp_path / "hub"
    moe.hf.save(ours, hub)
    whole = (hub / "model.safetensors").read_bytes()
    (hub / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        moe.hf.load(hub)
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="its weights are pickled"):
        moe.hf.load(hub)
    (hub / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        moe.hf.load(hub)
    (hub / "config.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        moe.hf.load(hub)


def test_an_index(draw: Draw, tmp_path: Path) -> None:
    """It must name files of its own directory, and exactly the tensors they hold."""
    moe.hf.save(draw("llama"), tmp_path, max_shard_bytes=5000)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())

    def written(**changes: str) -> None:
        file.write_text(json.dumps({"weight_map": {**index["weight_map"], **changes}}))

    written(**{"model.norm.weight": "../model.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"names '\.\./model.safetensors' for model.norm.weight: it must be a file of"
    ):
        moe.hf.load(tmp_path)
    written(**{"model.norm.weight": "elsewhere.safetensors"})
    with pytest.raises(CheckpointError, match=r"elsewhere.safetensors cannot be read"):
        moe.hf.load(tmp_path)
    written(extra=index["weight_map"]["model.norm.weight"])
    with pytest.raises(CheckpointError, match="disagree on extra"):
        moe.hf.load(tmp_path)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        moe.hf.load(tmp_path)
