"""Multi-token prediction, document masks and recomputed layers through the trainer, on one rank and on two."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Place = Any  # the fixture's class; conftest is not importable by name

WORDS = (
    "train.max_steps=6",
    "model.num_nextn_predict_layers=2",
    "data.mask_documents=true",
    "train.micro_batch_size=1",
)


def test_two_ranks_train_as_one_and_recomputation_changes_nothing(place: Place) -> None:
    """The same losses and weights on one rank, on two, and with every layer recomputed (bitwise)."""
    runs = {"one": (1, ()), "two": (2, ()), "again": (1, ("train.recompute_layers=4",))}
    for name, (ranks, words) in runs.items():
        done = place.launch(f"run.name={name}", *WORDS, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
    rows = {name: [row for row in place.rows(name) if "train/loss" in row] for name in runs}
    for one, two, again in zip(rows["one"], rows["two"], rows["again"], strict=True):
        assert again["train/loss"] == one["train/loss"]
        assert again["train/mtp_loss"] == one["train/mtp_loss"]
        assert again["router/max_vio/mtp_1"] == one["router/max_vio/mtp_1"]
        assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-5)
        assert two["train/mtp_loss"] == pytest.approx(one["train/mtp_loss"], abs=1e-5)
    assert rows["one"][-1]["train/mtp_loss"] < rows["one"][0]["train/mtp_loss"]
    weights = {name: load_file(place.run(name) / "checkpoints/step_00000006/model.safetensors") for name in runs}
    for name, tensor in weights["one"].items():
        assert torch.equal(weights["again"][name], tensor), name
        torch.testing.assert_close(weights["two"][name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_the_weight_of_further_tokens_is_the_recipes(place: Place) -> None:
    """Weight 0 leaves the modules as they were; the run's loss is the one without modules."""
    done = place.python("run.name=none", *WORDS, "train.mtp_loss_weight=0", "optim.weight_decay=0")
    assert done.returncode == 0, done.stderr
    done = place.python("run.name=some", *WORDS)
    assert done.returncode == 0, done.stderr
    none, some = (
        [row["train/mtp_loss"] for row in place.rows(name) if "train/loss" in row] for name in ("none", "some")
    )
    assert some[-1] < none[-1] - 0.001


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("model.num_nextn_predict_layers=31",), "train.seq_len=32 leaves 31 predicted tokens no room"),
        (("train.recompute_layers=3",), "train.recompute_layers=3 exceeds the model's layers: at most 2"),
    ],
)
def test_what_cannot_be_is_one_sentence(place: Place, words: tuple[str, ...], sentence: str) -> None:
    """More predicted tokens than the sequence has; more recomputed layers than the model has."""
    done = place.python(*words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
