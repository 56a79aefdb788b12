"""One optimizer step of a real run: the same however the batch is cut, and clipped by the norm of the whole gradient.

After the first step AdamW's first moment is (1 - beta1) times the gradient it was given, so a checkpoint shows it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.config import DataConfig, ModelConfig, OptimConfig, Recipe, RunConfig, TrainConfig
from moe.trainer import train

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=8, num_nextn_predict_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("update")
    letters = torch.randint(0, 14, (40_000,), generator=torch.Generator().manual_seed(0)).tolist()
    (place / "text").write_text("".join("etaoinshrdlu  "[letter] for letter in letters))
    return place


def _run(
    folder: Path, name: str, *, steps: int = 1, micro: int = 4, clip: float = 1e9, optimizer: str = "adamw"
) -> Path:
    train(
        Recipe(
            run=RunConfig(name=name, directory=str(folder / "runs")),
            data=DataConfig(source=str(folder / "text"), validation_fraction=0.1),
            model=MODEL,
            train=TrainConfig(
                max_steps=steps, global_batch_size=4, micro_batch_size=micro, seq_len=32, eval_sequences=1
            ),
            optim=OptimConfig(name=optimizer, lr=1e-3, warmup_steps=0, grad_clip=clip, weight_decay=0.0),
        )
    )
    return folder / "runs" / name


def _gradient(run: Path) -> dict[str, Tensor]:
    """What the optimizer was given in the first step."""
    state = load_file(run / "checkpoints/step_00000001/optimizer.safetensors")
    return {name: tensor / (1 - 0.9) for name, tensor in state.items() if name.endswith("/exp_avg")}


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).double().norm())


def _logged(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row][-1]


def test_a_batch_in_four_parts_is_the_batch(folder: Path) -> None:
    """One micro-batch of four sequences or four of one: loss and gradient agree to the rounding of fp32."""
    whole, parts = _run(folder, "whole"), _run(folder, "parts", micro=1)
    assert _logged(parts)["train/loss"] == pytest.approx(_logged(whole)["train/loss"], rel=1e-6)
    one, four = _gradient(whole), _gradient(parts)
    assert one.keys() == four.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-4, atol=1e-6 * float(tensor.abs().max()), msg=name)
    assert _norm({name: four[name] - tensor for name, tensor in one.items()}) < 1e-6 * _norm(one)
    biases = [load_file(run / "checkpoints/step_00000001/model.safetensors") for run in (whole, parts)]
    name = "layers.1.mlp.router.expert_bias"
    assert torch.equal(biases[0][name], biases[1][name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_five_steps_agree_too(folder: Path, optimizer: str) -> None:
    """What little the two gradients differ does not grow; Muon's products are in bf16, so its weights agree to that."""
    runs = [_run(folder, f"{optimizer}-{micro}", steps=5, micro=micro, optimizer=optimizer) for micro in (4, 1)]
    one, four = (load_file(run / "checkpoints/step_00000005/model.safetensors") for run in runs)
    start = load_file(_run(folder, f"{optimizer}-start") / "checkpoints/step_00000001/model.safetensors")
    moved = _norm({name: one[name] - start[name] for name in one})
    assert _norm({name: one[name] - four[name] for name in one}) < {"adamw": 1e-3, "muon": 2e-2}[optimizer] * moved


def test_the_gradient_is_clipped_as_a_whole(folder: Path) -> None:
    """Every parameter's gradient shrinks by one factor, to a norm of grad_clip over all; the norm before is logged."""
    free, clipped = _run(folder, "free"), _run(folder, "clipped", clip=0.05)
    before, after = _gradient(free), _gradient(clipped)
    norm = _norm(before)
    assert norm > 0.5
    assert _logged(free)["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert _logged(clipped)["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert _norm(after) == pytest.approx(0.05, rel=1e-5)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor * (0.05 / norm), rtol=1e-4, atol=1e-9, msg=name)
