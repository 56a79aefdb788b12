"""Balancing settings that contradict each other or the model are one sentence, from a recipe and from a Balancer."""

from typing import Any

import pytest

from moe.balancer import Balancer
from moe.config import ModelConfig, Recipe, RunConfig
from moe.config.parse import parse_overrides
from moe.errors import ConfigError
from moe.layers import MoE

RECIPE = Recipe(
    run=RunConfig(name="x"),
    model=ModelConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=12,
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("method=aux_loss", r"balance\.method='aux_loss' needs balance\.aux_loss_alpha above 0"),
        ("method=none aux_loss_alpha=0.1", r"balance\.aux_loss_alpha=0\.1 contradicts balance\.method=none"),
        ("method=quantile centre=true", r"balance\.centre=True is for balance\.method=sign, not quantile"),
        ("z_loss_alpha=-1", r"balance\.z_loss_alpha=-1\.0 must be at least 0"),
    ],
)
def test_contradictions_within_the_section(words: str, sentence: str) -> None:
    """Each names the field, its value and the mend."""
    with pytest.raises(ConfigError, match=sentence):
        parse_overrides(RECIPE, [f"balance.{word}" for word in words.split()])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("model.n_group=2", r"balance\.method='quantile' stalls when experts are in groups \(n_group=2\)"),
        ("model.num_experts_per_tok=6", r"'quantile' is undefined when every token takes all 6 experts"),
        ("model.topk_method=greedy", r"balance\.method='quantile' moves expert biases, which only"),
    ],
)
def test_quantile_needs_a_model_it_can_balance(words: str, sentence: str) -> None:
    """Groups stall it, K = E leaves it undefined, greedy routing has no bias."""
    parse_overrides(RECIPE, ["balance.method=quantile"])
    with pytest.raises(ConfigError, match=sentence):
        parse_overrides(RECIPE, ["balance.method=quantile", words])


def test_auxiliary_loss_needs_no_bias() -> None:
    """The classic pair: softmax scores, greedy choice, a loss."""
    words = ["balance.method=aux_loss", "balance.aux_loss_alpha=0.01", "model.topk_method=greedy"]
    assert parse_overrides(RECIPE, words).balance.has_losses


@pytest.mark.parametrize("changes", [{"n_group": 2, "topk_group": 2}, {"num_experts_per_tok": 8}])
def test_a_balancer_refuses_what_a_recipe_does(changes: dict[str, int]) -> None:
    """Layers used alone get the same answer."""
    settings = dict(hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8) | changes
    with pytest.raises(ConfigError, match=r"balance\.method='quantile'"):
        Balancer(MoE(**settings), method="quantile")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "aux_loss"}, "needs balance.aux_loss_alpha above 0"),
        ({"method": "none", "aux_loss_alpha": 0.1}, "contradicts balance.method=none"),
        ({"method": "quantile", "centre": True}, "is for balance.method=sign"),
    ],
)
def test_a_balancer_refuses_contradictions(settings: dict[str, Any], sentence: str) -> None:
    """What a recipe refuses, a Balancer made by hand refuses too."""
    with pytest.raises(ConfigError, match=sentence):
        Balancer(MoE(16, 8, 2, 8), **settings)


def test_all_experts_and_null_ones_can_be_balanced_by_quantiles() -> None:
    """K = E leaves a cut-off when there are null choices; recipe and layer agree."""
    Balancer(MoE(16, 4, 4, 8, n_null_experts=2), method="quantile")
    words = ["balance.method=quantile", "model.num_experts_per_tok=6"]
    parse_overrides(RECIPE, [*words, "model.n_null_experts=2"])
    with pytest.raises(ConfigError, match=r"balance\.method='quantile'"):
        parse_overrides(RECIPE, words)


def test_losses_need_our_routers() -> None:
    """A foreign router can be steered by its bias only."""
    import torch
    from torch import nn

    class Foreign(nn.Module):
        expert_bias = torch.zeros(4)
        tokens_per_expert = None

    Balancer(nn.Sequential(Foreign()))
    with pytest.raises(ConfigError, match=r"router '0' is not a moe\.layers\.Router: balance it by .*'sign'"):
        Balancer(nn.Sequential(Foreign()), z_loss_alpha=0.1)
