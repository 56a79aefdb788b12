"""Muon on stacked experts is torch.optim.Muon on every slice; with AdamW it is one optimizer to all who handle one."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from moe.balancer import Balancer
from moe.checkpoint import capture, load_checkpoint, write_checkpoint
from moe.config import ModelConfig, OptimConfig
from moe.model import Transformer
from moe.optim import ExpertMuon, build_optimizer, set_learning_rate
from moe.optim.muon import newton_schulz

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip
SHAPES = [(4, 24, 16), (3, 15, 36), (1, 7, 7), (2, 1, 9)]


def _train(stacked: bool, shape: tuple[int, ...], matrices: int, **settings: object) -> Tensor:
    """Weights (experts * matrices, rows, columns) after five steps, as one parameter or each matrix on its own.

    The first expert gets no gradient but zeros until the fourth step, as one without tokens.
    """
    generator = torch.Generator().manual_seed(0)
    experts, rows, columns = shape
    start = torch.randn(experts, matrices * rows, columns, generator=generator)
    grads = torch.randn(5, *start.shape, generator=generator) * 1e-3
    grads[:3, 0] = 0
    slices = (experts * matrices, rows, columns)
    if stacked:
        weights = [torch.nn.Parameter(start.clone())]
        optimizer: torch.optim.Optimizer = ExpertMuon(weights, lr=0.05, matrices=matrices, **settings)  # type: ignore[arg-type]
    else:
        weights = [torch.nn.Parameter(matrix.clone()) for matrix in start.view(slices)]
        optimizer = torch.optim.Muon(weights, lr=0.05, **settings)  # type: ignore[arg-type]
    for grad in grads:
        for weight, part in zip(weights, [grad] if stacked else grad.view(slices), strict=True):
            weight.grad = part.clone()
        optimizer.step()
    return torch.stack([weight.detach() for weight in weights]).view(slices)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("matrices", [1, 2], ids=["down", "gate_up"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_slice_is_updated_as_by_torch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], matrices: int, nesterov: bool, adjust_lr_fn: str
) -> None:
    """Five steps with decay; gate and up each on its own. In fp32, where only the order of sums may differ."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    settings = {"weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    ours, theirs = (_train(stacked, shape, matrices, **settings) for stacked in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bf16_the_two_differ_by_its_rounding(shape: tuple[int, ...]) -> None:
    """As it runs: one product over many matrices may round otherwise than one over one, not more."""
    ours, theirs = (_train(stacked, shape, 1, weight_decay=0.3) for stacked in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * 0.05 * 2**-6)


def test_gate_and_up_have_a_spectrum_each() -> None:
    """What both halves learn alike moves each of them in full; as one matrix it would move each by 1 / sqrt(2)."""
    half = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    grad = torch.cat((half, half), dim=1)
    weight = torch.nn.Parameter(torch.zeros_like(grad))
    weight.grad = grad.clone()
    ExpertMuon([weight], lr=1.0, matrices=2).step()
    gate, up = weight.detach().split(8, dim=1)
    assert torch.equal(gate, up)
    assert torch.linalg.svdvals(gate).min() > 0.6
    assert 0.6 < newton_schulz(grad)[:, :8].float().norm() / gate.norm() < 0.8


@pytest.mark.parametrize("shape", [(6, 16, 64), (6, 64, 16)], ids=["wide", "tall"])
def test_an_update_has_the_size_of_adamws(shape: tuple[int, ...]) -> None:
    """match_rms_adamw: entries of root mean square 0.2 x lr whatever the shape, so lr and weight decay carry over."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ExpertMuon([weight], lr=1.0, adjust_lr_fn="match_rms_adamw").step()
    assert 0.14 < weight.detach().square().mean().sqrt() < 0.26


def test_many_matrices_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept beside the weights is bounded, and no matrix is left out or taken twice."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.float().clone())
    whole = _train(True, (5, 8, 16), 2)
    monkeypatch.setattr("moe.optim.muon._BATCH", 3 * 8 * 16)
    torch.testing.assert_close(_train(True, (5, 8, 16), 2), whole, rtol=1e-5, atol=1e-5)


def test_a_gradient_may_lie_otherwise_in_memory() -> None:
    """As from a compiled backward pass: the update and its momentum are the same."""
    grad = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(3))
    weights = [torch.nn.Parameter(torch.zeros(3, 8, 12)) for _ in range(2)]
    weights[0].grad, weights[1].grad = grad, grad.mT.contiguous().mT
    for weight in weights:
        ExpertMuon([weight], matrices=2).step()
    assert torch.equal(*weights)


def _model_and_optimizer(seed: int) -> tuple[Transformer, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    return model, build_optimizer(model, OptimConfig(name="muon", lr=0.02))


def _steps(model: Transformer, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    balancer, losses = Balancer(model, bias_update_speed=0.01), []
    for step in steps:
        ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(step % 3))
        out = model(ids, labels=ids)
        (out.loss + out.mtp_loss).backward()
        set_learning_rate(optimizer, 0.02 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
        losses.append(out.loss.item())
    return losses


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Momentum, AdamW's moments and the groups' settings come back through the real checkpoint."""
    model, optimizer = _model_and_optimizer(0)
    _steps(model, optimizer, range(3))
    path = write_checkpoint(tmp_path, 3, capture(model, optimizer, {"tokens": 0}, copy=True))
    wanted = _steps(model, optimizer, range(3, 6))

    again, resumed = _model_and_optimizer(1)
    load_checkpoint(path, again, resumed)
    assert _steps(again, resumed, range(3, 6)) == wanted
    for (name, mine), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert resumed.state[mine].keys() == optimizer.state[theirs].keys(), name
        assert all(torch.equal(resumed.state[mine][key], value) for key, value in optimizer.state[theirs].items()), name
    for mine, theirs in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k not in ("params", "betas", "ns_coefficients")} == {
            k: v for k, v in theirs.items() if k not in ("params", "betas", "ns_coefficients")
        }


def test_accelerate_takes_it_as_one_optimizer() -> None:
    """Prepared by accelerate, which saves and loads its state on the way, it makes the same steps; loss falls."""
    model, optimizer = _model_and_optimizer(0)
    wanted = _steps(model, optimizer, range(12))
    again, plain = _model_and_optimizer(0)
    _steps(again, plain, range(3))
    prepared = Accelerator(cpu=True).prepare_optimizer(plain, device_placement=True)
    assert _steps(again, prepared, range(3, 12)) == wanted[3:]
    assert wanted[9] < wanted[0] - 0.1  # the same batch, three times later
