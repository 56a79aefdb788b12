"""Balancing: the update is the paper's, happens once a step over the whole batch, and never in evaluation."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe.balance import entropy, max_vio, quantile_update, sign_update
from moe.balancer import Balancer, LoadCounter, find_routers
from moe.errors import ConfigError
from moe.layers import MoE


def _layer(**changes: object) -> MoE:
    torch.manual_seed(0)
    settings = dict(hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8) | changes
    return MoE(**settings)  # type: ignore[arg-type]


def test_sign_update_is_the_papers() -> None:
    """b + u sign(mean - load): overloaded down, underloaded up, at the mean unmoved; a shift of all is kept."""
    bias = torch.tensor([0.0, 1.0, -1.0, 2.0])
    moved = sign_update(bias, torch.tensor([5, 1, 3, 3]), 0.25)
    assert moved.tolist() == [-0.25, 1.25, -1.0, 2.0]


def test_sign_update_compares_whole_numbers() -> None:
    """One row more or less of 10^12 is seen, where fp32 has 24 bits."""
    load = 10**12 + torch.tensor([0, 1, -1, 0])
    assert sign_update(torch.zeros(4), load, 1.0).tolist() == [0.0, -1.0, 1.0, 0.0]


class Launches(TorchDispatchMode):
    """Counts operations that compute something: on a GPU, kernels launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = ("view", "detach", "unbind", "split", "select", "slice", "expand", "unsqueeze", "alias", "empty")
        self.count += not any(word in func.__name__ for word in views)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sign", "quantile"])
def test_a_step_of_many_layers_launches_little_more_than_one_of_few(method: str) -> None:
    """Layers of one width move together, to the bit as each would alone; telemetry has two launches a layer left."""
    launches = {}
    for layers in (3, 12):
        torch.manual_seed(0)
        model = nn.ModuleList([_layer(n_routed_experts=6 if n == 1 else 8) for n in range(layers)])
        balancer = Balancer(model, method=method, bias_update_speed=0.01)
        want = []
        for layer in model:
            nn.init.normal_(layer.router.expert_bias, std=0.1)
            counts, bias = layer.router(torch.randn(30, 16)).tokens_per_expert_E, layer.router.expert_bias
            margins = layer.router.margin_histogram
            want.append(sign_update(bias, counts, 0.01) if margins is None else quantile_update(bias, margins, 2))
        with Launches() as counted:
            balancer.step()
        launches[layers] = counted.count
        for layer, bias in zip(model, want, strict=True):
            assert torch.equal(layer.router.expert_bias, bias)
    assert launches[12] - launches[3] <= 2 * 9


def test_max_vio_and_entropy() -> None:
    """Perfect balance is 0 and 1; all on one of four is 3 and 0; a layer without tokens violates nothing."""
    loads = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0], [3, 1, 2, 2]])
    assert max_vio(loads).tolist() == [0.0, 3.0, 0.0, 0.5]
    assert entropy(loads)[:2].tolist() == pytest.approx([1.0, 0.0])


def test_one_update_a_step_from_all_micro_batches() -> None:
    """Counts add up over micro-batches; the biases move once, against the sum; then counting starts anew."""
    layer = _layer()
    balancer = Balancer(layer, bias_update_speed=0.5)
    chunks = torch.randn(3, 40, 16).unbind()
    counts = sum(layer.router(x).tokens_per_expert_E.long() for x in chunks)
    load = balancer.step().tokens_per_expert["router"]
    assert torch.equal(load, counts)
    assert int(load.sum()) == 3 * 40 * 2
    assert torch.equal(layer.router.expert_bias, sign_update(torch.zeros(8), counts, 0.5))
    before = layer.router.expert_bias.clone()
    assert balancer.step().tokens_per_expert == {}
    assert torch.equal(layer.router.expert_bias, before)


def test_evaluation_and_no_grad_do_not_count() -> None:
    """Neither evaluation nor a training-mode forward without gradients steers the biases, nor a skipped step."""
    layer, x = _layer(), torch.randn(10, 16)
    balancer = Balancer(layer)
    layer.eval()
    layer(x)
    layer.train()
    with torch.no_grad():
        layer(x)
    assert layer.router.tokens_per_expert is None
    layer(x)
    balancer.skip()
    assert balancer.step().tokens_per_expert == {}
    assert torch.equal(layer.router.expert_bias, torch.zeros(8))


def test_a_step_without_load_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Who forgot `model.train()` sees why nothing balances; who recorded something, or moves no bias, sees nothing."""
    layer, x = _layer().eval(), torch.randn(10, 16)
    Balancer(layer, method="none").step()
    balancer = Balancer(layer)
    layer.train()(x)
    balancer.step()
    assert not caplog.records
    for _ in range(2):
        layer.eval()(x)
        balancer.step()
    assert ["in training mode" in record.getMessage() for record in caplog.records] == [True]


def test_a_frozen_router_does_not_count() -> None:
    """A teacher in training mode, whose input has a gradient: its load is nobody's to balance."""
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8)
    layer.requires_grad_(False)
    layer(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert layer.router.tokens_per_expert is None


def test_load_counter_counts_in_evaluation_and_leaves_training_alone() -> None:
    """Evaluation's loads are its own; hooks are gone afterwards."""
    layer, x = _layer(), torch.randn(10, 16)
    layer(x)
    pending = layer.router.tokens_per_expert
    layer.eval()
    with LoadCounter(layer) as counter:
        layer(x)
        layer(x)
    layer(x)
    assert int(counter.load().tokens_per_expert["router"].sum()) == 2 * 10 * 2
    assert layer.router.tokens_per_expert is pending


def test_counts_are_not_buffers_and_biases_not_parameters() -> None:
    """DistributedDataParallel overwrites buffers; the optimizer must not see the bias."""
    layer = _layer()
    layer(torch.randn(10, 16))
    assert [name for name, _ in layer.named_buffers()] == ["router.expert_bias"]
    assert "router.expert_bias" not in dict(layer.named_parameters())


def test_the_bias_steers_selection_but_not_the_output_of_the_chosen() -> None:
    """With every expert chosen (K = E) the bias changes nothing at all; with K < E it changes who is chosen."""
    everyone, x = _layer(num_experts_per_tok=8), torch.randn(10, 16)
    before = everyone(x)
    everyone.router.expert_bias.uniform_(-1, 1)
    torch.testing.assert_close(everyone(x), before, atol=1e-6, rtol=1e-5)
    some = _layer()
    some.router.expert_bias[3] = 100.0
    route = some.router(x)
    assert (route.topk_index_TK == 3).any(dim=1).all()
    torch.testing.assert_close(route.topk_weight_TK.sum(1), torch.ones(10))


def test_load_counter_sees_a_compiled_model() -> None:
    """Compiled before the block, counted in it, and again in another block; without a new graph each time."""
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16)
    with torch.no_grad():
        compiled(x)
        for _ in range(3):
            with LoadCounter(layer) as counter:
                compiled(x)
                compiled(x)
            assert int(counter.load().tokens_per_expert["router"].sum()) == 20
        with torch.compiler.set_stance("fail_on_recompile"), LoadCounter(layer) as counter:
            compiled(x)
    assert int(counter.load().tokens_per_expert["router"].sum()) == 10


def test_any_module_that_follows_the_protocol_is_balanced() -> None:
    """An expert bias and a count are all the balancer asks for, whoever wrote the module."""

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("expert_bias", torch.zeros(4))
            self.tokens_per_expert = torch.tensor([4, 0, 0, 0])

    model = nn.Sequential(nn.Linear(2, 2), Foreign())
    assert list(find_routers(model)) == ["1"]
    Balancer(model, bias_update_speed=1.0).step()
    assert model[1].expert_bias.tolist() == [-1.0, 1.0, 1.0, 1.0]


def test_a_router_without_a_bias_cannot_be_steered() -> None:
    """greedy routing has no bias: the sentence names the router."""
    with pytest.raises(ConfigError, match=r"balance\.method='sign' needs an expert bias, and router 'router' has none"):
        Balancer(_layer(topk_method="greedy"))
    Balancer(_layer(topk_method="greedy"), method="none").step()


def test_balancing_balances() -> None:
    """Tokens that all prefer the same experts: 200 steps of the rule bring the worst violation below a tenth."""
    layer = _layer(n_routed_experts=8, num_experts_per_tok=2)
    balancer = Balancer(layer, bias_update_speed=0.01)
    nn.init.normal_(layer.router.weight, std=0.3)
    x = torch.randn(512, 16) + torch.randn(16)
    violations = []
    for _ in range(200):
        layer(x)
        violations.append(balancer.step().max_vio()["router"])
    assert violations[0] > 1.0
    assert violations[-1] < 0.1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok=9 must be between 1 and n_routed_experts \(8\)"),
        ({"topk_method": "best"}, "topk_method='best' must be one of greedy, group_limited_greedy, noaux_tc"),
        ({"n_group": 4, "num_experts_per_tok": 3}, "num_experts_per_tok=3 exceeds the 2 experts of topk_group groups"),
        ({"n_null_experts": -2}, "n_null_experts=-2 must be at least 0"),
        ({"topk_method": "greedy", "n_group": 4}, "n_group=4 needs topk_method group_limited_greedy or noaux_tc"),
        ({"n_group": 3}, r"n_group=3 must divide n_routed_experts \(8\)"),
    ],
)
def test_an_impossible_layer_is_one_sentence(changes: dict[str, int], sentence: str) -> None:
    """The layer checks itself without a ModelConfig."""
    with pytest.raises(ConfigError, match=sentence):
        _layer(**changes)
