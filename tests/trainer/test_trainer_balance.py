"""Balancing through the trainer: every method runs, losses stay apart, ranks agree, telemetry is written."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Place = Any  # the fixture's class; conftest is not importable by name

LOSSES = ("balance.method=aux_loss", "balance.aux_loss_alpha=0.05", "balance.z_loss_alpha=0.01")


def test_losses_are_logged_apart_and_add_up_over_ranks(place: Place) -> None:
    """train/loss is cross-entropy alone; two ranks with two micro-batches each train as one rank with four."""
    words = (*LOSSES, "train.max_steps=6", "train.micro_batch_size=1")
    for name, number in (("losses1", 1), ("losses2", 2)):
        done = place.launch(f"run.name={name}", *words, ranks=number)
        assert done.returncode == 0, done.stderr
    done = place.python("run.name=without", "balance.method=none", "train.max_steps=6", "train.micro_batch_size=1")
    assert done.returncode == 0, done.stderr
    rows = {
        name: [row for row in place.rows(name) if "train/loss" in row] for name in ("losses1", "losses2", "without")
    }
    assert not any("train/balance_loss" in row for row in rows["without"])
    assert rows["losses1"][0]["train/loss"] == pytest.approx(rows["without"][0]["train/loss"], abs=1e-6)
    # at the start nothing is steered yet: the auxiliary loss is near 1, the z-loss near ln(4 e^0)^2, both weighted
    assert rows["losses1"][0]["train/balance_loss"] == pytest.approx(0.05 * 1.05 + 0.01 * 1.92, abs=0.01)
    for one, two in zip(rows["losses1"], rows["losses2"], strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], abs=1e-5)
        assert one["train/balance_loss"] == pytest.approx(two["train/balance_loss"], abs=1e-5)
    mine, theirs = (_weights(place, name, 6) for name in ("losses1", "losses2"))
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-4, rtol=1e-3, msg=name)


def test_quantile_balancing_trains_alike_on_two_ranks_and_writes_telemetry(place: Place) -> None:
    """The same biases whatever the number of ranks; every router metric in every row; balance without a step size."""
    words = ("balance.method=quantile", "train.max_steps=20")
    for name, number in (("quantile1", 1), ("quantile2", 2)):
        done = place.launch(f"run.name={name}", *words, ranks=number)
        assert done.returncode == 0, done.stderr
    mine, theirs = (_weights(place, name, 20) for name in ("quantile1", "quantile2"))
    bias = "layers.1.mlp.router.expert_bias"
    assert mine[bias].abs().max() > 0
    torch.testing.assert_close(mine[bias], theirs[bias], atol=1e-4, rtol=0)
    rows = [row for row in place.rows("quantile1") if "train/loss" in row]
    for row in rows:
        assert row["router/max_vio/layer_01"] == row["router/max_vio"]
        assert 1 / 2 <= row["router/confidence"] < 1  # the first of two chosen has at least half of their weight
        assert 0 <= row["router/entropy"] <= 1
    assert rows[-1]["router/bias_range"] == pytest.approx(float(mine[bias].max() - mine[bias].min()))
    assert "router/dead_experts" in rows[-1]


def _weights(place: Place, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(place.run(name) / f"checkpoints/step_{step:08d}/model.safetensors")
