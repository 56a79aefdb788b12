"""Files: several with an index, the stacked layout, dtypes, what goes along with a model, configurations of old."""

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
from moe.hf.families import FAMILIES

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers (extra `hf`)")

Draw = Callable[..., Transformer]
IDS = torch.arange(11)[None]


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards(family: str, draw: Draw, transformers_load: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Weights beyond a size go into several files, which we and transformers read; sizes keep to the limit."""
    ours = draw(family)
    moe.hf.save(ours, tmp_path, max_shard_bytes=20_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / file).values()) for file in files]
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert _same(moe.hf.load(tmp_path), ours)
    torch.testing.assert_close(transformers_load(tmp_path)(IDS).logits, ours(IDS).logits, atol=1e-4, rtol=0)


def test_another_model_in_the_same_place(draw: Draw, tmp_path: Path) -> None:
    """Files of the model before, more or fewer, are gone; what is not weights stays."""
    big, small = draw("mixtral", 1), draw("llama", 2)
    (tmp_path / "notes.txt").write_text("mine")
    for model, limit in ((big, 5_000), (small, 5_000), (big, 10**9), (small, 5_000)):
        moe.hf.save(model, tmp_path, max_shard_bytes=limit)
        assert _same(moe.hf.load(tmp_path), model)
    held = {path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert held == set(index["weight_map"].values())
    assert (tmp_path / "notes.txt").exists()


def test_saved_over_itself(draw: Draw, tmp_path: Path) -> None:
    """A loaded model holds no view of the file it came from."""
    ours = draw("olmoe")
    moe.hf.save(ours, tmp_path)
    loaded = moe.hf.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    moe.hf.save(loaded, tmp_path)
    assert _same(moe.hf.load(tmp_path), ours)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "mixtral", "qwen3_moe", "olmoe"])
def test_stacked_experts(family: str, draw: Draw, transformers_load: Callable[..., nn.Module], tmp_path: Path) -> None:
    """transformers can write its own layout, experts stacked and Mixtral's block called mlp; we read it."""
    ours = draw(family)
    moe.hf.save(ours, tmp_path / "hub")
    transformers_load(tmp_path / "hub").save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "stacked/model.safetensors").keys()
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    assert not any("experts.0." in name for name in names)
    assert _same(moe.hf.load(tmp_path / "stacked"), ours)


def test_dtypes(draw: Draw, transformers_load: Callable[..., nn.Module], tmp_path: Path) -> None:
    """bf16 stays bf16, expert biases stay fp32, on both sides; a dtype that is asked for wins."""
    ours = draw("deepseek_v3").to(torch.bfloat16)
    moe.hf.save(ours, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "correction_bias" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in stored.items() if "correction_bias" not in name} == {torch.bfloat16}
    theirs = transformers_load(tmp_path)
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "theirs")
    for directory in (tmp_path, tmp_path / "theirs"):
        assert _same(moe.hf.load(directory), ours)
        assert {parameter.dtype for parameter in moe.hf.load(directory).parameters()} == {torch.bfloat16}
    wide = moe.hf.load(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in wide.parameters())


@pytest.mark.parametrize(("said", "dtype"), [({"torch_dtype": "float16"}, torch.float16), ({}, torch.bfloat16)])
def test_dtype_of_older_files(said: dict[str, str], dtype: torch.dtype, draw: Draw, tmp_path: Path) -> None:
    """transformers 4 called it torch_dtype; where nothing is said the embedding decides."""
    moe.hf.save(draw("llama").to(dtype), tmp_path)
    file = tmp_path / "config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "dtype"}
    file.write_text(json.dumps({**config, **said}))
    assert moe.hf.load(tmp_path).embed_tokens.weight.dtype == dtype


def test_what_goes_along(draw: Draw, transformers_load: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Token ids, generation settings and tokenizer of the model it came from; never its code."""
    source, out = tmp_path / "source", tmp_path / "out"
    moe.hf.save(draw("llama"), source)
    config = json.loads((source / "config.json").read_text())
    config.update(eos_token_id=[5, 6], bos_token_id=1)
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 6], "bos_token_id": 1}')
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_mine.py").write_text("raise SystemExit")
    model = moe.hf.load(source)
    moe.hf.save(model, out, like=source)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    theirs = transformers_load(out)
    assert theirs.config.eos_token_id == [5, 6]
    assert theirs.generation_config.eos_token_id == [5, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_mean_what_transformers_takes_them_for(family: str) -> None:
    """Older files leave fields out; our table of what that means is checked against transformers' classes."""
    table = dict(FAMILIES[family].absent)
    theirs: Any = transformers.CONFIG_MAPPING[family]()
    assert table.pop("rope_theta") == theirs.rope_parameters["rope_theta"]
    for name in ("n_group", "topk_group") if family == "deepseek_v2" else ():
        assert (table.pop(name), getattr(theirs, name)) == (1, None)  # null: no groups
    if family == "deepseek_v3":  # 1 would have us miss weights that files without the field do not hold
        assert (table.pop("num_nextn_predict_layers"), theirs.num_nextn_predict_layers) == (0, 1)
    assert table == {name: getattr(theirs, name) for name in table}


def test_greedy_v2_ignores_groups(draw: Draw, tmp_path: Path) -> None:
    """A file may give groups beside topk_method greedy; transformers then ignores them, and so do we."""
    ours = draw("deepseek_v2", topk_method="greedy", n_group=1, topk_group=1)
    moe.hf.save(ours, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_group": 2, "topk_group": 1}))
    assert moe.hf.load(tmp_path).config == ours.config
