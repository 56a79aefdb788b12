"""Runs with train.precision=fp8: what is multiplied how, resumption to the bit, and a model without routed experts."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe.config import Recipe
from moe.errors import ConfigError
from moe.layers import Experts, MoE
from moe.layers.experts import multiply_in_fp8
from moe.rundir import RunDir, read_metrics
from moe.trainer import train
from moe.trainer.entry import _check_fp8

from .tiny_recipe import RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    letters = torch.randint(0, 14, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text").write_text("".join("etaoinshrdlu  "[letter] for letter in letters))
    return dataclasses.replace(
        RECIPE,
        run=dataclasses.replace(RECIPE.run, name="straight", directory=str(tmp_path / "runs")),
        data=dataclasses.replace(RECIPE.data, source=str(tmp_path / "text")),
        train=dataclasses.replace(RECIPE.train, precision="fp8", max_steps=12, checkpoint_every_steps=6),
    )


def named(recipe: Recipe, name: str, **train_fields: object) -> Recipe:
    """The same under another name."""
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, name=name),
        train=dataclasses.replace(recipe.train, **train_fields),
    )


def weights(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """Of a checkpoint."""
    place = Path(recipe.run.directory) / recipe.run.name / "checkpoints" / f"step_{step:08d}"
    return load_file(place / "model.safetensors") | load_file(place / "optimizer.safetensors")


def metrics(recipe: Recipe) -> list[dict[str, float]]:
    """The rows of a run."""
    return list(read_metrics(RunDir.named(recipe.run.name, recipe.run.directory).metrics))


def test_trains_and_resumes_to_the_bit(recipe: Recipe) -> None:
    """Stopped half-way and gone on, the run has the weights and moments of one that was never stopped; they are not
    those of bf16, and near them."""
    recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, schedule="wsd"))
    assert train(recipe).reason == "complete"
    halves = named(recipe, "halves", max_steps=6)
    train(halves)
    train(named(halves, "halves", max_steps=12))
    want, got = weights(recipe, 12), weights(halves, 12)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    plain = named(recipe, "plain", precision="bf16")
    train(plain)
    losses = [[row["train/loss"] for row in metrics(r) if "train/loss" in row] for r in (recipe, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {t.dtype for t in weights(recipe, 12).values()} == {torch.float32}


def test_a_dense_model_says_that_it_trains_as_bf16(recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    """No routed experts, no 8 bits: said once, and the losses are those of bf16."""
    dense = dataclasses.replace(named(recipe, "dense", max_steps=2), model=recipe.model.dense_twin(match="active"))
    train(dense)
    assert "this model has none: it trains as with bf16" in "".join(capfd.readouterr())
    plain = named(dense, "dense-bf16", precision="bf16")
    train(plain)
    assert all(torch.equal(a, weights(plain, 2)[name]) for name, a in weights(dense, 2).items())


def test_a_device_without_it_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that names the field; a model without routed experts needs no 8 bits."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"train.precision='fp8' needs .* 8.9 or newer, and cuda has 8.0"):
        _check_fp8(recipe, torch.device("cuda"))
    _check_fp8(dataclasses.replace(recipe, model=recipe.model.dense_twin(match="active")), torch.device("cuda"))


def test_layers_choose(recipe: Recipe) -> None:
    """`MoE(fp8=True)` by itself, and all experts of a model at once."""
    layer = MoE(16, 4, 2, 8, fp8=True)
    assert layer.experts.fp8
    model = torch.nn.ModuleList([MoE(16, 4, 2, 8), torch.nn.Linear(2, 2), Experts(16, 8, 4)])
    assert multiply_in_fp8(model) == 2
    assert all(module.fp8 for module in model.modules() if isinstance(module, Experts))
    x = torch.randn(6, 16)
    layer.load_state_dict(model[0].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), model[0](x))
