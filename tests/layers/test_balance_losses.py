"""Balance losses: their values by hand, who asks for them, and that they never touch the output or the loss."""

import math

import pytest
import torch
from torch import Tensor

from moe.balance import load_balancing_loss, sequence_loss, z_loss
from moe.balancer import Balancer
from moe.config import ModelConfig
from moe.layers import MoE
from moe.layers.router import take_balance_loss
from moe.model import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1,
)  # fmt: skip


def _transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def test_load_balancing_loss_by_hand() -> None:
    """1 at perfect balance for any K; E/K when all agree; in between E sum f P, with gradients through P alone."""
    even = torch.eye(4).roll(1, 0) + torch.eye(4)  # every expert chosen twice with K = 2, each with half the score
    assert float(load_balancing_loss(even, torch.tensor([2, 2, 2, 2]))) == pytest.approx(1.0)
    agreed = torch.tensor([[1.0, 0, 0, 0]]).repeat(5, 1)
    assert float(load_balancing_loss(agreed, torch.tensor([5, 0, 0, 0]))) == pytest.approx(4.0)
    scores = torch.tensor([[0.6, 0.2, 0.2], [0.3, 0.9, 0.3]], requires_grad=True)
    loss = load_balancing_loss(scores, torch.tensor([2, 2, 0]))
    mean = [(0.6 + 0.2) / 2, (0.2 + 0.6) / 2, (0.2 + 0.2) / 2]
    assert loss.item() == pytest.approx(3 * (0.5 * mean[0] + 0.5 * mean[1]))
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] < 0  # more score for the idle expert lowers the loss
    assert scores.grad[0, 0] > 0


def test_sequence_loss_by_hand() -> None:
    """Each sequence is judged alone: two one-sided sequences that balance each other still cost."""
    left, right = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    mixed = torch.stack([left, right, right, left])
    assert float(sequence_loss(mixed, 1, sequences=2)) == pytest.approx(1.0)
    sided = torch.stack([left, left, right, right])
    assert float(sequence_loss(sided, 1, sequences=2)) == pytest.approx(2 * 0.9)
    assert float(sequence_loss(sided, 1, sequences=1)) == pytest.approx(1.0)


def test_sequence_loss_chooses_by_the_unbiased_score() -> None:
    """f comes from the scores themselves, so a bias that moves the choice leaves the loss alone."""
    layer = _layer(sequence_loss_alpha=0.5)
    x = torch.randn(2, 10, 16)
    layer(x)
    before = take_balance_loss(layer)
    layer.router.expert_bias[3] = 100.0
    layer(x)
    after = take_balance_loss(layer)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


def test_z_loss_by_hand() -> None:
    """logsumexp of two equal logits a is a + ln 2."""
    logits = torch.tensor([[1.0, 1.0], [-2.0, -2.0]])
    want = ((1 + math.log(2)) ** 2 + (-2 + math.log(2)) ** 2) / 2
    assert float(z_loss(logits)) == pytest.approx(want)


def _layer(**balance: float) -> MoE:
    torch.manual_seed(0)
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8)
    Balancer(layer, **balance)  # type: ignore[arg-type]
    return layer


def test_a_layer_leaves_its_weighted_losses_once() -> None:
    """The sum of the three with their weights; taken once; (batch, sequence) decides where sequences end."""
    layer = _layer(aux_loss_alpha=0.3, sequence_loss_alpha=0.2, z_loss_alpha=0.1)
    seen: list[Tensor] = []
    layer.router.register_forward_hook(lambda module, args, route: seen.extend((route[2], route[3], args[0])))
    layer(torch.randn(3, 10, 16))
    scores, counts, x = seen
    want = 0.3 * load_balancing_loss(scores, counts) + 0.2 * sequence_loss(scores, 2, 3)
    want = want + 0.1 * z_loss(x @ layer.router.weight.T)
    taken = take_balance_loss(layer)
    assert taken is not None
    torch.testing.assert_close(taken, want)
    assert take_balance_loss(layer) is None


def test_only_training_with_gradients_pays() -> None:
    """Without alphas, in evaluation and without gradients there is no loss to add."""
    model, ids = _transformer(), torch.randint(0, 61, (2, 8))
    assert model(ids, labels=ids).balance_loss is None
    Balancer(model, z_loss_alpha=0.1)
    assert model(ids, labels=ids).balance_loss is not None
    with torch.no_grad():
        assert model(ids, labels=ids).balance_loss is None
    assert model.eval()(ids, labels=ids).balance_loss is None
    Balancer(model.train())
    assert model(ids, labels=ids).balance_loss is None


def test_losses_change_gradients_and_nothing_else() -> None:
    """Logits and loss are bitwise those without; the balance loss reaches the router's weight."""
    model, ids = _transformer(), torch.randint(0, 61, (2, 8))
    plain = model(ids, labels=ids)
    Balancer(model, method="aux_loss", aux_loss_alpha=0.1)
    asked = model(ids, labels=ids)
    assert torch.equal(plain.logits, asked.logits)
    assert torch.equal(plain.loss, asked.loss)
    asked.balance_loss.backward()
    assert model.layers[1].mlp.router.weight.grad.abs().max() > 0
    assert model.lm_head.weight.grad is None


def test_the_transformers_loss_is_the_mean_over_layers() -> None:
    """Not over pooled tokens: a layer that collapses is not hidden by one that does not."""
    model, ids = _transformer(), torch.randint(0, 61, (2, 8))
    Balancer(model, method="aux_loss", aux_loss_alpha=1.0)
    seen = []
    for layer in model.layers[1:]:
        layer.mlp.router.register_forward_hook(
            lambda module, args, route: seen.append(load_balancing_loss(route[2], route[3]))
        )
    out = model(ids, labels=ids)
    assert len(seen) == 2
    torch.testing.assert_close(out.balance_loss, (seen[0] + seen[1]) / 2)


def test_an_auxiliary_loss_balances() -> None:
    """Gradient descent on the loss alone spreads tokens that all prefer the same experts."""
    layer = _layer()
    balancer = Balancer(layer, method="aux_loss", aux_loss_alpha=1.0)
    x = torch.randn(256, 16) + 2 * torch.randn(16)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    violations = []
    for _ in range(60):
        layer(x)
        loss = take_balance_loss(layer)
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        violations.append(balancer.step().max_vio()["router"])
    assert violations[0] > 1
    assert violations[-1] < 0.5 * violations[0]
    assert torch.equal(layer.router.expert_bias, torch.zeros(8))


def test_sequences_of_padding_have_no_part() -> None:
    """The mean is over sequences that hold a token: a batch is not better balanced for being padded."""
    scores = torch.rand(12, 5)
    alone = sequence_loss(scores[:6], 2, 1)
    counted = torch.tensor([True] * 6 + [False] * 6)
    torch.testing.assert_close(sequence_loss(scores, 2, 2, counted), alone)
    torch.testing.assert_close(
        sequence_loss(scores, 2, 2, torch.ones(12, dtype=torch.bool)), sequence_loss(scores, 2, 2)
    )
    assert sequence_loss(scores, 2, 2, torch.zeros(12, dtype=torch.bool)) == 0
