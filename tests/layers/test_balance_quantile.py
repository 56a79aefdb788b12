"""Quantile balancing: the histogram finds the exact quantile's biases, for any scores, whatever the micro-batches."""

import math

import pytest
import torch
from torch import Tensor

from moe.balance import margin_histogram, max_vio, quantile_update
from moe.balancer import Balancer
from moe.layers import MoE


def _exact(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """The definition: the K/E-quantile over tokens of alpha - s, minus its mean over experts."""
    tokens, experts = scores.shape
    alpha = (scores + bias).sort(dim=1, descending=True).values[:, top_k : top_k + 1]
    quantile = (alpha - scores).kthvalue(round(tokens * top_k / experts), dim=0).values
    return quantile - quantile.mean()


def _scores(score_func: str, experts: int, tokens: int = 4096) -> Tensor:
    logits = torch.randn(tokens, experts) + 0.7 * torch.randn(experts)
    return logits.sigmoid() if score_func == "sigmoid" else logits.softmax(-1)


def _load(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    return torch.bincount((scores + bias).topk(top_k).indices.flatten(), minlength=scores.shape[1])


@pytest.mark.parametrize(
    ("score_func", "experts", "top_k"), [("sigmoid", 16, 3), ("sigmoid", 64, 6), ("softmax", 64, 6)]
)
def test_the_histogram_is_as_good_as_the_exact_quantile(score_func: str, experts: int, top_k: int) -> None:
    """One step from zero lies within a few percent of the exact one; ten steps balance the tokens as well."""
    torch.manual_seed(0)
    scores = _scores(score_func, experts)
    start = torch.zeros(experts)
    exact = _exact(scores, start, top_k)
    found = quantile_update(start, margin_histogram(scores, start, top_k), top_k)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()
    ours, theirs = start, start
    for _ in range(10):
        ours = quantile_update(ours, margin_histogram(scores, ours, top_k), top_k)
        theirs = _exact(scores, theirs, top_k)
    assert max_vio(_load(scores, start, top_k)) > 0.4
    assert max_vio(_load(scores, ours, top_k)) < max_vio(_load(scores, theirs, top_k)) + 0.02


def test_a_histogram_by_hand() -> None:
    """Two experts, K = 1: margins are the differences of the two scores, and the median of them balances."""
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    histogram = margin_histogram(scores, torch.zeros(2), 1)
    assert histogram.sum(1).tolist() == [4, 4]
    bias = quantile_update(torch.zeros(2), histogram, 1)
    assert float(bias.sum()) == pytest.approx(0, abs=1e-6)
    assert _load(scores, bias, 1).tolist() == [2, 2]


def test_biases_far_apart_are_handled() -> None:
    """An imported model's biases may be anything: margins beyond the bins count as the largest, and it converges."""
    torch.manual_seed(0)
    scores = _scores("sigmoid", 8)
    bias = torch.tensor([30.0, -30, 5, 5, 2, 2, 0, 0])
    for _ in range(20):
        bias = quantile_update(bias, margin_histogram(scores, bias, 2), 2)
    assert max_vio(_load(scores, bias, 2)) < 0.05


def _layer(**changes: object) -> MoE:
    torch.manual_seed(0)
    settings = dict(hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=8) | changes
    return MoE(**settings)  # type: ignore[arg-type]


def test_micro_batches_add_up_to_the_batch() -> None:
    """Three micro-batches give bitwise the biases of one batch; the next step starts from an empty histogram."""
    x = torch.randn(3, 40, 16)
    parts, whole = _layer(), _layer()
    for layer, batches in ((parts, x.unbind()), (whole, (x,))):
        balancer = Balancer(layer, method="quantile")
        for batch in batches:
            layer(batch)
        balancer.step()
        assert layer.router.margin_histogram is None
    assert parts.router.expert_bias.abs().max() > 0
    assert torch.equal(parts.router.expert_bias, whole.router.expert_bias)


def test_only_training_steers_and_skipped_steps_do_not() -> None:
    """Evaluation, no_grad and skip() leave no margins behind; other methods collect none."""
    layer, x = _layer(), torch.randn(10, 16)
    balancer = Balancer(layer, method="quantile")
    layer.eval()(x)
    layer.train()
    with torch.no_grad():
        layer(x)
    assert layer.router.margin_histogram is None
    layer(x)
    balancer.skip()
    assert balancer.step().tokens_per_expert == {}
    assert torch.equal(layer.router.expert_bias, torch.zeros(8))
    Balancer(layer)
    layer(x)
    assert layer.router.margin_histogram is None


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_it_balances_a_layer_in_a_few_steps(score_func: str) -> None:
    """No step size to choose: fresh tokens that prefer the same experts are even after five steps."""
    layer = _layer(score_func=score_func)
    balancer = Balancer(layer, method="quantile")
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    preference = torch.randn(16)
    violations = []
    for _ in range(8):
        layer(torch.randn(2048, 16) + preference)
        violations.append(balancer.step().max_vio()["router"])
    assert violations[0] > 0.9
    assert max(violations[5:]) < 0.2


def test_a_step_goes_its_share_of_the_way() -> None:
    """1 is the rule itself, bit for bit; less lies between, and many short steps on the same tokens arrive as well."""
    torch.manual_seed(0)
    scores, start = _scores("sigmoid", 16), torch.randn(16)
    start -= start.mean()
    histogram = margin_histogram(scores, start, 3)
    whole = quantile_update(start, histogram, 3)
    assert torch.equal(quantile_update(start, histogram, 3, 1.0), whole)
    torch.testing.assert_close(quantile_update(start, histogram, 3, 0.25), torch.lerp(start, whole, 0.25))
    bias = start
    for _ in range(60):
        bias = quantile_update(bias, margin_histogram(scores, bias, 3), 3, 0.2)
    assert max_vio(_load(scores, start, 3)) > 1
    assert max_vio(_load(scores, bias, 3)) < 0.02


def test_short_steps_lie_stiller_than_batches() -> None:
    """On batches too small for their own quantiles, a tenth of the way each balances all tokens better."""
    torch.manual_seed(0)
    scores = _scores("sigmoid", 16, 40 * 128)
    violation = {}
    for step in (1.0, 0.1):
        bias = _exact(scores, torch.zeros(16), 3)
        after = []
        for batch in scores.split(128):
            bias = quantile_update(bias, margin_histogram(batch, bias, 3), 3, step)
            after.append(float(max_vio(_load(scores, bias, 3))))
        violation[step] = sum(after) / len(after)
    assert violation[0.1] < 0.7 * violation[1.0]


def test_the_balancer_takes_the_step() -> None:
    """`quantile_step` reaches the rule: from zero biases, half of it is half of the bias."""
    x = torch.randn(200, 16)
    biases = []
    for step in (1.0, 0.5):
        layer = _layer()
        balancer = Balancer(layer, method="quantile", quantile_step=step)
        layer(x)
        balancer.step()
        biases.append(layer.router.expert_bias)
    assert biases[0].abs().max() > 0
    torch.testing.assert_close(biases[1], biases[0] / 2)


def test_biases_stay_where_no_token_was_counted() -> None:
    """A batch of padding alone has no quantile: neither NaN nor a move, and telemetry that is finite."""
    start = torch.tensor([0.5, -0.25, 0.0, 0.5])
    assert torch.equal(quantile_update(start, torch.zeros(4, 256, dtype=torch.int32), 2), start)
    layer = MoE(16, 4, num_experts_per_tok=2, moe_intermediate_size=8)
    balancer = Balancer(layer, method="quantile")
    layer(torch.randn(5, 16), torch.zeros(5, dtype=torch.bool)).sum().backward()
    row = balancer.step().metrics()
    assert all(math.isfinite(value) for value in row.values()), row
    assert layer.router.expert_bias is not None
    assert not layer.router.expert_bias.any()
