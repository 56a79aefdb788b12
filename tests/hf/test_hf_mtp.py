"""Multi-token prediction modules in hub files: behind the decoder layers, as DeepSeek-V3's release holds them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe.hf
from moe import Transformer
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.hf.families import FAMILIES
from moe.layers.rope import rotary_tables

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers (extra `hf`)")

Draw = Callable[..., Transformer]
IDS = torch.randint(30, (2, 13), generator=torch.Generator().manual_seed(7))


def _edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _theirs(directory: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model, and its report on what it found in the files."""
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )


def _same_files(one: Path, other: Path) -> bool:
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine
    )


@pytest.mark.parametrize("seed", range(12))
def test_round_trip(seed: int, draw: Draw, tmp_path: Path) -> None:
    """Weights, configuration and loss come back bit by bit, and so do the files; tied heads and odd sizes included."""
    ours = draw("deepseek_v3", seed, num_nextn_predict_layers=1 + seed % 3)
    moe.hf.save(ours, tmp_path / "one")
    again = moe.hf.load(tmp_path / "one")
    assert again.config.num_nextn_predict_layers == ours.config.num_nextn_predict_layers == len(again.mtp)
    state = again.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())
    assert torch.equal(again.train()(IDS, labels=IDS).mtp_loss, ours.train()(IDS, labels=IDS).mtp_loss)
    moe.hf.save(again, tmp_path / "two")
    assert _same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "changes",
    [{"n_shared_experts": 0}, {"tie_word_embeddings": True}, {"initialization": "scaled"}, "dense"],
    ids=["no shared experts", "tied", "scaled", "dense"],
)
def test_round_trip_of_variants(changes: dict[str, Any] | str, draw: Draw, tmp_path: Path) -> None:
    """In several files too, where a copy may lie apart from what it repeats."""
    ours = draw("deepseek_v3", 1, num_nextn_predict_layers=2, **(changes if isinstance(changes, dict) else {}))
    if changes == "dense":
        ours = Transformer(ours.config.dense_twin().replace(num_nextn_predict_layers=2))
    for limit in (10**9, 20_000):
        moe.hf.save(ours, tmp_path, max_shard_bytes=limit)
        state = moe.hf.load(tmp_path).state_dict()
        assert state.keys() == ours.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())


def test_names_are_the_released_ones(draw: Draw, tmp_path: Path) -> None:
    """DeepSeek-V3's index lists these under model.layers.61, the experts' matrices aside."""
    ours = draw("deepseek_v3", 0, num_nextn_predict_layers=1, q_lora_rank=5, attention_bias=False, n_shared_experts=1)
    moe.hf.save(ours, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    place = f"model.layers.{ours.config.num_hidden_layers}."
    found = {name.removeprefix(place) for name in tensors if name.startswith(place) and ".experts." not in name}
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    parts = ["embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "input_layernorm"]
    parts += ["post_attention_layernorm", "mlp.gate", *(f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down"))]
    parts += [f"self_attn.{name}" for name in attention]
    assert found == {f"{part}.weight" for part in parts} | {"mlp.gate.e_score_correction_bias"}
    assert f"{place}mlp.experts.0.gate_proj.weight" in tensors
    assert torch.equal(tensors[f"{place}embed_tokens.weight"], ours.embed_tokens.weight)
    assert torch.equal(tensors[f"{place}shared_head.head.weight"], ours.lm_head.weight)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_transformers_loads_the_model_itself(seed: int, draw: Draw, tmp_path: Path) -> None:
    """Its class, our logits, the same greedy text; it reports the predictors' tensors, those alone, as unexpected."""
    ours = draw("deepseek_v3", seed, num_nextn_predict_layers=2)
    moe.hf.save(ours, tmp_path)
    theirs, report = _theirs(tmp_path)
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    layers = ours.config.num_hidden_layers
    extra = {name for name in load_file(tmp_path / "model.safetensors") if _layer(name) >= layers}
    unexpected = {re.sub(r"\.experts\..*", "", name) for name in report.pop("unexpected_keys")}
    assert unexpected == {re.sub(r"\.experts\..*", "", name) for name in extra}  # it stacks experts before it counts
    assert not any(report.values()), report
    assert (theirs(IDS).logits - ours(IDS).logits).abs().max() <= 1e-4
    written = theirs.generate(IDS[:, :5], max_new_tokens=8, do_sample=False)
    assert written[:, 5:].tolist() == ours.generate(IDS[:, :5].tolist(), 8)


def _layer(name: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _assert_predictors_agree(ours: Transformer, theirs: Any) -> None:
    """Hidden states after each module, each fed with our own of the depth before."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    predictors = MtpModel.from_pretrained(theirs).eval()
    cache = MtpCache(config=theirs.config.get_mtp_config())
    hidden = ours(IDS).hidden
    for k, module in enumerate(ours.mtp):
        known = IDS.shape[1] - k - 1
        positions = torch.arange(known)[None]
        other = predictors.forward_layer(k, hidden[:, :known], positions, cache, input_ids=IDS[:, k + 1 :])
        rotary = rotary_tables(positions, ours.config.rotary_dim, ours.config.rope_theta)
        hidden = module(ours.embed_tokens(IDS[:, k + 1 :]), hidden[:, :known], rotary)
        torch.testing.assert_close(hidden, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_transformers_predicts_alike(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules for speculative decoding, which read the same tensors, compute what ours do."""
    cls = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3ForCausalLM
    for seed in range(3):
        plain = {"rope_type": "default", "rope_factor": 1.0}
        ours = draw("deepseek_v3", seed, num_nextn_predict_layers=2, first_k_dense_replace=0, **plain)
        layers = ours.config.num_hidden_layers
        monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.({layers}|{layers + 1})\..*"])
        moe.hf.save(ours, tmp_path / str(seed))
        _assert_predictors_agree(ours, _theirs(tmp_path / str(seed))[0])


@torch.no_grad()
def test_as_deep_as_the_release(tmp_path: Path) -> None:
    """With 61 layers transformers reports nothing, and drafts with our module: the text is that without drafts."""
    config = ModelConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=61, num_attention_heads=1, intermediate_size=8,
        kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, q_lora_rank=4, n_routed_experts=2,
        n_shared_experts=1, num_experts_per_tok=1, moe_intermediate_size=4, first_k_dense_replace=60,
        num_nextn_predict_layers=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = Transformer(config).eval()
    moe.hf.save(ours, tmp_path)
    theirs, report = _theirs(tmp_path)
    assert not any(report.values()), report
    _assert_predictors_agree(ours, theirs)
    plain = theirs.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False)
    drafted = theirs.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False, use_mtp=True)
    assert torch.equal(plain, drafted)
    assert plain[0, 5:].tolist() == ours.generate(IDS[:1, :5].tolist(), 8)[0]


def test_stated_but_not_there(draw: Draw, tmp_path: Path) -> None:
    """Repackaged files, and those transformers writes, often keep the number alone: one notice, and a whole model."""
    ours = draw("deepseek_v3", num_nextn_predict_layers=1)
    moe.hf.save(ours, tmp_path / "ours")
    _theirs(tmp_path / "ours")[0].save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"num_nextn_predict_layers=1, but the files hold none") as caught:
        again = moe.hf.load(tmp_path / "theirs")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert again.config.num_nextn_predict_layers == 0
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("said", [{}, {"num_nextn_predict_layers": None}, {"num_mtp_layers": 1}])
def test_other_ways_of_saying_how_many(said: dict[str, int | None], draw: Draw, tmp_path: Path) -> None:
    """Absent or null: none. transformers' name for it counts as well."""
    moe.hf.save(draw("deepseek_v3", num_nextn_predict_layers=said.get("num_mtp_layers", 0)), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["num_nextn_predict_layers"]
    file.write_text(json.dumps({**config, **said}))
    assert len(moe.hf.load(tmp_path).mtp) == said.get("num_mtp_layers", 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_copies(copy: str, tied: bool, draw: Draw, tmp_path: Path) -> None:
    """They may be left out; one that is there and differs from the model's own is refused."""
    ours = draw("deepseek_v3", num_nextn_predict_layers=1, tie_word_embeddings=tied)
    moe.hf.save(ours, tmp_path)
    name = f"model.layers.{ours.config.num_hidden_layers}.{copy}"
    own = "lm_head.weight" if copy.startswith("shared") and not tied else "model.embed_tokens.weight"
    _edit(tmp_path, lambda tensors: tensors[name][3, 2].add_(1))
    with pytest.raises(CheckpointError, match=rf"{name} in .* differs from {own}, whose copy it is$") as caught:
        moe.hf.load(tmp_path)
    assert "\n" not in str(caught.value)
    _edit(tmp_path, lambda tensors: tensors.pop(name))
    assert torch.equal(moe.hf.load(tmp_path).mtp[0].eh_proj.weight, ours.mtp[0].eh_proj.weight)


def test_parts_of_a_module(draw: Draw, tmp_path: Path) -> None:
    """A module that is there in part is an error; one more than stated is dropped with a notice."""
    ours = draw("deepseek_v3", num_nextn_predict_layers=2)
    moe.hf.save(ours, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_nextn_predict_layers": 2', '"num_nextn_predict_layers": 1'))
    with pytest.warns(UserWarning, match="dropped 1 multi-token prediction"):
        assert len(moe.hf.load(tmp_path).mtp) == 1
    last = f"model.layers.{ours.config.num_hidden_layers}."
    _edit(tmp_path, lambda tensors: tensors.pop(f"{last}hnorm.weight"))
    with pytest.raises(CheckpointError, match=f"has no tensor {last}hnorm.weight"):
        moe.hf.load(tmp_path)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_v3"])
def test_other_families_have_none(family: str, draw: Draw, tmp_path: Path) -> None:
    """Refused in one sentence, before anything is written; how weights started out hinders no export."""
    with pytest.raises(ConfigError, match=r"^model.num_nextn_predict_layers=1 cannot be exported: \w+ has only 0$"):
        moe.hf.save(draw(family, num_nextn_predict_layers=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ours = draw(family, initialization="scaled")
    moe.hf.save(ours, tmp_path / "out")
    assert torch.equal(moe.hf.load(tmp_path / "out")(IDS).logits, ours(IDS).logits)
