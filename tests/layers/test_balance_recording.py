"""What routers record: once per forward whatever recomputes it, compiled or not, in every precision."""

import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe.balancer import Balancer
from moe.errors import ConfigError
from moe.layers import MoE
from moe.layers.router import take_balance_loss


def _layer(**changes: object) -> MoE:
    torch.manual_seed(0)
    settings = dict(hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8) | changes
    return MoE(**settings)  # type: ignore[arg-type]


class Block(nn.Module):
    """Products before and after the experts, so that recomputation starts from other nodes too."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.moe, self.after = nn.Linear(16, 16), _layer(), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.relu(x + self.moe(self.before(x))))


def _recorded(model: nn.Module, **how: Any) -> dict[str, torch.Tensor]:
    """What one forward and backward leaves in the router, and its gradients."""
    torch.manual_seed(1)
    x = torch.randn(2, 10, 16, requires_grad=True)
    balancer = Balancer(model, method="quantile")
    for _ in range(2):  # two micro-batches
        (checkpoint(model, x, **how) if how else model(x)).square().sum().backward()
    router = next(m for m in model.modules() if isinstance(m, MoE)).router
    found = {
        "counts": router.tokens_per_expert,
        "margins": router.margin_histogram,
        "first": router.first_choice,
        "grad": router.weight.grad,
    }
    balancer.step()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("make", [_layer, Block])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_records_once(make: Any, reentrant: bool) -> None:
    """Both kinds leave exactly what no checkpointing leaves: counts, margins, confidence, gradients."""
    plain = _recorded(make())
    assert int(plain["counts"].sum()) == 2 * 20 * 2
    assert int(plain["margins"].sum()) == 2 * 20 * 8
    found = _recorded(make(), use_reentrant=reentrant)
    for name, want in plain.items():
        assert torch.equal(found[name], want), name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # reentrant in reentrant
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_checkpoints_within_checkpoints_record_once(outer: bool, inner: bool) -> None:
    """A checkpointed layer inside a checkpointed model, in every combination of kinds."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x * 1.0, use_reentrant=inner)

    plain, found = _recorded(Block()), _recorded(Nested(), use_reentrant=outer)
    assert torch.equal(found["counts"], plain["counts"])


def test_balance_loss_leaves_a_checkpointed_region() -> None:
    """Non-reentrant checkpointing gives the loss and its gradients; the reentrant kind says that it cannot."""
    gradients = []
    for how in ({}, {"use_reentrant": False}):
        block = Block()
        Balancer(block, z_loss_alpha=0.1, aux_loss_alpha=0.1)
        torch.manual_seed(1)
        x = torch.randn(2, 10, 16, requires_grad=True)
        y = checkpoint(block, x, **how) if how else block(x)  # type: ignore[arg-type]
        loss = take_balance_loss(block)
        assert loss is not None
        (y.sum() + loss).backward()
        gradients.append([parameter.grad for parameter in block.parameters()])
        assert take_balance_loss(block) is None
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    y = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(ConfigError, match=re.escape("use_reentrant=False")):
        y.sum().backward()


def test_a_compiled_layer_records_as_an_eager_one() -> None:
    """torch.compile traces the recording too, without breaking the graph at it."""
    eager, traced = _layer(), _layer()
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for layer in (eager, traced):
        Balancer(layer, method="quantile")
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(2, 10, 16)
        eager(x).sum().backward()
        compiled(x).sum().backward()
    assert torch.equal(eager.router.tokens_per_expert, traced.router.tokens_per_expert)
    assert torch.equal(eager.router.margin_histogram, traced.router.margin_histogram)


@pytest.mark.parametrize("method", ["sign", "quantile"])
def test_the_bias_moves_in_fp32_whatever_the_model_is_cast_to(method: str) -> None:
    """A step of 0.001 on a bias of 2 survives bf16 weights and autocast; the optimizer never sees it."""
    layer = _layer().to(torch.bfloat16)
    layer.router.expert_bias.copy_(2 + 0.1 * torch.rand(8))
    before = layer.router.expert_bias.clone()
    balancer = Balancer(layer, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(64, 16, dtype=torch.bfloat16)).sum().backward()
    load = balancer.step()
    bias = layer.router.expert_bias
    assert bias.dtype == torch.float32
    assert not any(parameter is bias for parameter in layer.parameters())
    if method == "sign":
        counts = load.tokens_per_expert["router"]
        moved = (bias - before)[counts != counts.float().mean()]
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-3), atol=1e-6, rtol=0)
    assert not torch.equal(bias, bias.bfloat16().float())


def test_centring_keeps_the_mean_and_the_selection() -> None:
    """Uncentred biases drift when more experts are below the mean than above; centred ones do not, and route alike."""
    plain, centred = _layer(), _layer()
    balancers = [Balancer(plain, bias_update_speed=0.01), Balancer(centred, bias_update_speed=0.01, centre=True)]
    torch.manual_seed(1)
    for _ in range(30):
        x = torch.randn(64, 16) + 1
        loads = []
        for layer, balancer in zip((plain, centred), balancers, strict=True):
            layer(x)
            loads.append(balancer.step().tokens_per_expert["router"])
        assert torch.equal(*loads)
    assert plain.router.expert_bias.mean().abs() > 0.005
    assert centred.router.expert_bias.mean().abs() < 1e-6


def test_every_expert_has_a_gradient_with_or_without_tokens() -> None:
    """An expert no token chose gets zeros, not None: no rank waits for a gradient that never comes."""
    layer = _layer()
    layer.router.expert_bias[0] = -100.0
    layer(torch.randn(10, 16)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
    assert not layer.experts.down_proj.grad[0].any()
    assert layer.experts.down_proj.grad[1:].any()


def test_telemetry_is_what_the_routes_say() -> None:
    """Of each layer and over layers: confidence is the mean first weight before scaling, the others by definition."""
    model = nn.ModuleDict({"layers": nn.ModuleList([_layer(routed_scaling_factor=2.5), _layer()])})
    balancer = Balancer(model, bias_update_speed=0.5)
    model["layers"][1].router.expert_bias[0] = 100.0
    weights = []
    for layer in model["layers"]:
        x = torch.randn(30, 16)
        weights.append(layer.router(x).topk_weight_TK[:, 0].mean() / layer.router.routed_scaling_factor)
    load = balancer.step()
    row = load.metrics()
    measures = ("router/max_vio", "router/entropy", "router/dead_experts", "router/confidence")
    assert set(row) == {f"{name}{at}" for name in measures for at in ("", "/layer_00", "/layer_01")}
    for number, weight in enumerate(weights):
        assert row[f"router/confidence/layer_0{number}"] == pytest.approx(weight.item(), abs=1e-5)
    assert row["router/confidence"] == pytest.approx((weights[0] + weights[1]).item() / 2, abs=1e-5)
    loads = load.tokens_per_expert.values()
    for number, load_E in enumerate(loads):
        share = load_E.double() / load_E.sum()
        entropy = -(share[share > 0] * share[share > 0].log()).sum() / math.log(len(share))
        assert row[f"router/entropy/layer_0{number}"] == pytest.approx(entropy.item(), abs=1e-5)
        assert row[f"router/dead_experts/layer_0{number}"] == int((load_E == 0).sum())
    assert row["router/dead_experts"] == sum(int((load_E == 0).sum()) for load_E in loads)
    assert row["router/entropy"] == min(row["router/entropy/layer_00"], row["router/entropy/layer_01"])
    assert row["router/max_vio/layer_01"] == row["router/max_vio"] == pytest.approx(3.0)  # expert 0 has all 30 of 7.5
    assert row["router/max_vio/layer_00"] < 3
    # expert 0 stepped down to 99.5; idle experts stepped up to 0.5, any busy one down
    biases = model["layers"][1].router.expert_bias
    ranges = balancer.bias_metrics()
    assert (
        ranges["router/bias_range"] == ranges["router/bias_range/layer_01"] == float(biases.max() - biases.min()) > 98
    )
    assert ranges["router/bias_range/layer_00"] <= 1
    assert balancer.step().metrics() == {}
