"""Null experts: a token may pass fewer than K real experts; loads, losses, telemetry and accounting know it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.balancer import Balancer, LoadCounter
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.layers import MoE
from moe.model import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=4, n_null_experts=2, moe_intermediate_size=12, initializer_range=0.3,
)  # fmt: skip


def _layer(**more: object) -> MoE:
    torch.manual_seed(0)
    layer = MoE(16, 6, num_experts_per_tok=4, moe_intermediate_size=8, n_null_experts=3, **more)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    return layer


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_equals_real_experts_that_return_zero(score_func: str, normalise: bool) -> None:
    """The same layer with nine real experts, the last three of zeros: output and every shared gradient."""
    null = _layer(score_func=score_func, norm_topk_prob=normalise)
    real = MoE(16, 9, 4, 8, score_func=score_func, norm_topk_prob=normalise)  # type: ignore[arg-type]
    with torch.no_grad():
        real.router.weight.copy_(null.router.weight)
        for mine, theirs in zip(real.experts.parameters(), null.experts.parameters(), strict=True):
            mine.zero_()[:6].copy_(theirs)
    x = torch.randn(3, 7, 16, requires_grad=True)
    outs = [layer(x) for layer in (null, real)]
    torch.testing.assert_close(outs[0], outs[1])
    grads = [
        torch.autograd.grad(out.square().sum(), (x, layer.router.weight))
        for out, layer in zip(outs, (null, real), strict=True)
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    counts = null.router.tokens_per_expert
    assert counts is not None
    assert counts.shape == (9,)
    assert int(counts.sum()) == 3 * 7 * 4


def test_fewer_matrix_products_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product, forward and backward, stops where the null rows begin."""
    computed: list[int] = []
    product = torch.nn.functional.grouped_mm

    def spy(*args: Any, offs: Tensor) -> Tensor:
        computed.append(int(offs[-1]))
        return product(*args, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spy)
    layer = _layer()
    layer(torch.randn(1, 50, 16, requires_grad=True)).sum().backward()
    counts = layer.router.tokens_per_expert
    assert counts is not None
    real = int(counts[:6].sum())
    assert 0 < real < 200
    assert computed == [real] * 6  # two forward, two for inputs, two for weights


def test_the_mean_is_what_the_configuration_says_once_balanced() -> None:
    """Biases move tokens onto null experts like onto any: at even load K E / (E + nulls) real experts a token."""
    layer = _layer()
    balancer = Balancer(layer, method="quantile")
    x = torch.randn(4, 500, 16)
    for _ in range(10):
        layer(x).sum().backward()
        load = balancer.step()
    row = load.metrics()
    assert row["router/computed_share"] == pytest.approx(6 / 9, rel=0.01)
    assert row["router/max_vio"] < 0.05


def test_a_null_expert_without_tokens_is_not_dead() -> None:
    """Only real experts can be dead; the evaluation's counter knows it too."""
    layer = _layer()
    with torch.no_grad():
        layer.router.expert_bias[6:] = -10.0  # type: ignore[index]
    with LoadCounter(layer) as counter, torch.no_grad():
        layer(torch.randn(1, 200, 16))
    row = counter.load().metrics()
    assert row["router/dead_experts"] == 0
    assert row["router/computed_share"] == 1


def test_in_a_model_with_telemetry() -> None:
    """Trains, counts, generates; without null experts the metric is absent."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    balancer = Balancer(model)
    ids = torch.randint(61, (2, 16))
    model(ids, labels=ids).loss.backward()
    assert 0 < balancer.step().metrics()["router/computed_share"] < 1
    assert len(model.generate([[1, 2, 3]], 4)[0]) == 4
    plain = Transformer(CONFIG.replace(n_null_experts=0))
    balancer = Balancer(plain)
    plain(ids, labels=ids).loss.backward()
    assert "router/computed_share" not in balancer.step().metrics()


def test_a_token_of_null_choices_alone_passes_the_shared_experts() -> None:
    """Then the routed part is exactly zero."""
    layer = _layer(n_shared_experts=1)
    with torch.no_grad():
        layer.router.expert_bias.copy_(torch.tensor([-9.0] * 5 + [0.0] + [9.0] * 3))  # type: ignore[union-attr]
        layer.experts.down_proj[5] = 0
    x = torch.randn(5, 16)
    assert layer.shared_experts is not None
    assert torch.equal(layer(x), layer.shared_experts(x))


def test_groups_are_refused() -> None:
    """A null expert is in no group; one sentence from the layer and from the configuration."""
    with pytest.raises(ConfigError, match="n_null_experts=3 are in no group"):
        _layer(n_group=2, topk_group=1)
    with pytest.raises(ConfigError, match="n_null_experts=2 are in no group"):
        CONFIG.replace(n_group=2, topk_group=2)
