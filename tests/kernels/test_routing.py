"""topk_route against a per-token loop: exact choice given its own scores, fp64 weights and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import KernelError, topk_route

FP32 = 1e-5  # routing is fp32 whatever the dtype of the logits

# tokens, experts, arguments
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one-token": (1, 5, {"top_k": 2}),
    "one-expert": (7, 1, {"top_k": 1}),
    "all-experts": (7, 6, {"top_k": 6, "routed_scaling_factor": 2.5}),
    "odd": (63, 24, {"top_k": 3, "norm_topk_prob": False, "routed_scaling_factor": 16.0}),
    "softmax": (63, 33, {"top_k": 4, "score_func": "softmax"}),
    "softmax-raw": (7, 20, {"top_k": 5, "score_func": "softmax", "norm_topk_prob": False}),
    "greedy-ignores-groups": (7, 12, {"top_k": 5, "n_group": 4, "topk_group": 1}),
    "group-max": (63, 15, {"top_k": 4, "topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 2}),
    "group-top2": (63, 24, {"top_k": 6, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2}),
    "group-all-kept": (7, 12, {"top_k": 4, "topk_method": "noaux_tc", "n_group": 3, "topk_group": 3}),
    "group-filled": (7, 12, {"top_k": 6, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2}),
    "many-experts": (5, 512, {"top_k": 10, "score_func": "softmax"}),
    "groups-of-one": (7, 6, {"top_k": 2, "topk_method": "noaux_tc", "n_group": 6, "topk_group": 3}),
}


def choose(scores: Tensor, bias: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    """The experts of each token by Python's own sort of fp32 values: descending, lowest index first among equals."""
    biased = (scores if bias is None else scores + bias).cpu()
    method, n_group = arguments.get("topk_method", "greedy"), arguments.get("n_group", 1)
    rows = []
    for row in biased:
        allowed = list(range(len(row)))
        if method != "greedy":
            size = len(row) // n_group
            groups = [row[g * size : (g + 1) * size].sort(descending=True).values for g in range(n_group)]
            best = [float(g[:2].sum() if method == "noaux_tc" else g[0]) for g in groups]
            kept = sorted(range(n_group), key=lambda g: (-best[g], g))[: arguments["topk_group"]]
            allowed = [e for e in allowed if e // size in kept]
        rows.append(sorted(allowed, key=lambda e: (-float(row[e]), e))[: arguments["top_k"]])
    return torch.tensor(rows)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_the_per_token_loop(place: Any, case: str, with_bias: bool) -> None:
    """Scores, choice, weights, counts, and the gradient of the logits through weights and scores."""
    n_tokens, n_experts, arguments = CASES[case]
    logits = torch.randn(n_tokens, n_experts).to(place.dtype).to(place.device).requires_grad_()
    bias = torch.randn(n_experts, device=place.device) if with_bias else None
    out = topk_route(logits, bias, backend=place.backend, **arguments)

    truth = logits.detach().double().cpu().requires_grad_()
    scores = truth.softmax(-1) if arguments.get("score_func") == "softmax" else truth.sigmoid()
    index = choose(out.scores_TE.detach(), bias, arguments)
    weight = scores.gather(1, index)
    if arguments.get("norm_topk_prob", True):
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    weight = weight * arguments.get("routed_scaling_factor", 1.0)

    assert out.topk_index_TK.dtype == torch.int64
    assert torch.equal(out.topk_index_TK.cpu(), index)
    assert out.tokens_per_expert_E.dtype == torch.int32
    assert torch.equal(out.tokens_per_expert_E.cpu(), torch.bincount(index.flatten(), minlength=n_experts).int())
    assert out.topk_weight_TK.dtype == out.scores_TE.dtype == torch.float32
    place.agree("scores", scores, out.scores_TE, FP32)
    place.agree("weights", weight, out.topk_weight_TK, FP32)

    g_weight, g_scores = torch.randn(n_tokens, arguments["top_k"]), torch.randn(n_tokens, n_experts)
    truth_grad = torch.autograd.grad([weight, scores], truth, [g_weight.double(), g_scores.double()])[0]
    grads = [g_weight.to(place.device), g_scores.to(place.device)]
    grad = torch.autograd.grad([out.topk_weight_TK, out.scores_TE], logits, grads)[0]
    assert grad.dtype == place.dtype
    place.agree("d_logits", truth_grad, grad)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("through", ["weights", "scores"])
def test_gradient_through_one_output(place: Any, score_func: str, through: str) -> None:
    """Each differentiable output carries its gradient alone, the other counting as zero."""
    logits = torch.randn(7, 9, device=place.device, requires_grad=True)
    out = topk_route(logits, top_k=3, score_func=score_func, backend=place.backend)
    truth = logits.detach().double().cpu().requires_grad_()
    scores = truth.softmax(-1) if score_func == "softmax" else truth.sigmoid()
    weight = scores.gather(1, out.topk_index_TK.cpu())
    weight = weight / weight.sum(-1, keepdim=True)
    want, got = (weight, out.topk_weight_TK) if through == "weights" else (scores, out.scores_TE)
    seed = torch.randn(want.shape)
    want.backward(seed.double())
    got.backward(seed.to(place.device))
    place.agree("d_logits", truth.grad, logits.grad, FP32)


def test_ties_go_to_the_lowest_index(place: Any) -> None:
    """Equal scores everywhere, in one row of many, across groups, and at the border of the chosen."""
    equal = topk_route(torch.zeros(3, 40, device=place.device), top_k=5, backend=place.backend)
    assert equal.topk_index_TK.tolist() == [[0, 1, 2, 3, 4]] * 3
    logits = torch.tensor([[0.0, 2, 1, 2, 1, 2], [5.0, 4, 3, 2, 1, 0]], device=place.device)
    assert topk_route(logits, top_k=4, backend=place.backend).topk_index_TK.tolist() == [[1, 3, 5, 2], [0, 1, 2, 3]]
    grouped = topk_route(
        torch.tensor([[0.0, 1, 1, 0, 1, 0, 0, 1]], device=place.device),
        top_k=3,
        topk_method="noaux_tc",
        n_group=4,
        topk_group=2,
        backend=place.backend,
    )
    assert grouped.topk_index_TK.tolist() == [[1, 2, 0]]


def test_large_tie_heavy_rows(place: Any) -> None:
    """Many ties in many rows: coarse logits over 128 experts."""
    n_tokens = 16 if place.backend == "triton" and place.device == "cpu" else 512
    logits = torch.randn(n_tokens, 128, device=place.device).round()
    out = topk_route(logits, top_k=8, backend=place.backend)
    assert torch.equal(out.topk_index_TK.cpu(), choose(out.scores_TE, None, {"top_k": 8}))


def test_all_tokens_on_one_expert_and_skewed_loads(place: Any) -> None:
    """Load is counted exactly across programs, however many tokens one expert has."""
    n_tokens = 300
    zipf = torch.multinomial(1 / torch.arange(1.0, 13.0), n_tokens, replacement=True)
    for favourite in (torch.zeros(n_tokens, dtype=torch.int64), zipf):
        logits = torch.randn(n_tokens, 12).scatter_(1, favourite.unsqueeze(1), 9.0).to(place.device)
        out = topk_route(logits, top_k=2, backend=place.backend)
        assert torch.equal(out.topk_index_TK[:, 0].cpu(), favourite)
        counts = torch.bincount(out.topk_index_TK.flatten().cpu(), minlength=12)
        assert out.tokens_per_expert_E.tolist() == counts.tolist()


def test_losing_groups_never_win_with_negative_biases(place: Any) -> None:
    """Losers are masked with -inf, not zero: every biased score is negative here."""
    logits = torch.tensor([[0.0, 0, 0, 0, 9, 9]], device=place.device)
    bias = torch.full((6,), -5.0, device=place.device)
    arguments: dict[str, Any] = {"top_k": 2, "topk_method": "noaux_tc", "n_group": 3, "topk_group": 1}
    assert topk_route(logits, bias, backend=place.backend, **arguments).topk_index_TK.tolist() == [[4, 5]]


def test_bias_selects_but_does_not_weigh(place: Any) -> None:
    """The bias changes the choice; weights come from the unbiased scores and no gradient reaches it."""
    logits = torch.tensor([[2.0, 1.0, 0.0]], device=place.device, requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 5.0], device=place.device, requires_grad=True)
    out = topk_route(logits, bias, top_k=2, backend=place.backend)
    assert out.topk_index_TK.tolist() == [[2, 0]]
    s = torch.tensor([0.0, 2.0]).sigmoid()
    place.agree("weights", (s / s.sum())[None], out.topk_weight_TK, FP32)
    out.topk_weight_TK[0, 0].backward()
    assert bias.grad is None


def test_worked_example(place: Any) -> None:
    """The four numbers of the file's docstring."""
    logits = torch.tensor([[0.9, 0.5, 0.5, 0.1]]).logit().to(place.device)
    out = topk_route(logits, top_k=2, backend=place.backend)
    assert out.topk_index_TK.tolist() == [[0, 1]]
    place.agree("weights", torch.tensor([[9 / 14, 5 / 14]]), out.topk_weight_TK, FP32)
    assert out.tokens_per_expert_E.tolist() == [1, 1, 0, 0]


def test_nan_logits_still_choose_distinct_experts(place: Any) -> None:
    """A diverged run fails in its loss, not by an index out of range."""
    logits = torch.full((4, 6), float("nan"), device=place.device)
    index = topk_route(logits, top_k=4, backend=place.backend).topk_index_TK
    assert all(len(set(row)) == 4 and set(row) <= set(range(6)) for row in index.tolist())


def test_no_tokens_and_strided_logits(place: Any) -> None:
    """Zero tokens give empty results; any strides are taken."""
    out = topk_route(torch.empty(0, 6, device=place.device), top_k=2, backend=place.backend)
    assert out.topk_index_TK.shape == (0, 2)
    assert out.tokens_per_expert_E.tolist() == [0] * 6
    logits = torch.randn(6, 5, device=place.device).to(place.dtype)
    strided = topk_route(logits.t(), top_k=2, backend=place.backend)
    plain = topk_route(logits.t().contiguous(), top_k=2, backend=place.backend)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 9}, "top_k=9"),
        ({"top_k": 2, "score_func": "relu"}, "score_func='relu'"),
        ({"top_k": 2, "topk_method": "best"}, "topk_method='best'"),
        ({"top_k": 2, "topk_method": "noaux_tc", "n_group": 3}, "n_group=3"),
        ({"top_k": 2, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 5}, "topk_group=5"),
        ({"top_k": 3, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 1}, "top_k=3"),
        ({"top_k": 2, "expert_bias_E": torch.zeros(3)}, "expert_bias_E"),
        ({"top_k": 2, "backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_wrong_arguments_name_value_and_mend(arguments: dict[str, Any], words: str) -> None:
    """One sentence with what was given."""
    with pytest.raises(KernelError, match=words):
        topk_route(torch.zeros(2, 8), **arguments)


def test_library_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree, with and without a bias."""
    logits, bias = torch.randn(5, 8, requires_grad=True), torch.randn(8)
    chosen = torch.rand(logits.shape).argsort(-1)[:, :2].contiguous()
    for given in (
        (bias, None, None, 2, "sigmoid", "noaux_tc", 4, 2, True, 2.5, False, 0),
        (None, chosen, None, 2, "softmax", "greedy", 1, 1, False, 1.0, False, 0),
    ):
        torch.library.opcheck(torch.ops.moe_kernels.topk_route.default, (logits, *given, "torch"))


def test_compiles_as_one_graph() -> None:
    """torch.compile(fullgraph=True) sees one node and gives the same gradients."""

    def route(logits: Tensor) -> Tensor:
        out = topk_route(logits, top_k=2)
        return (out.topk_weight_TK**2).sum() + (out.scores_TE**3).sum()

    logits = torch.randn(5, 8, requires_grad=True)
    want = torch.autograd.grad(route(logits), logits)[0]
    got = torch.autograd.grad(torch.compile(route, fullgraph=True, backend="aot_eager")(logits), logits)[0]
    assert torch.equal(want, got)


@pytest.mark.parametrize("case", ["softmax-raw", "group-top2", "odd", "all-experts"])
@pytest.mark.usefixtures("poisoned_memory")
def test_choices_made_before_are_taken_as_they_are(place: Any, case: str) -> None:
    """Another router's choices, with this one's weights and gradients; its own choices give the same bits again."""
    n_tokens, n_experts, arguments = CASES[case]
    normalise, scale = arguments.get("norm_topk_prob", True), arguments.get("routed_scaling_factor", 1.0)
    logits = torch.randn(n_tokens, n_experts).to(place.dtype).to(place.device).requires_grad_()
    g_weight = torch.randn(n_tokens, arguments["top_k"], device=place.device)
    first = topk_route(logits, None, backend=place.backend, **arguments)
    again = topk_route(logits, None, chosen_TK=first.topk_index_TK, backend=place.backend, **arguments)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    grads = [torch.autograd.grad(out.topk_weight_TK, logits, g_weight)[0] for out in (first, again)]
    assert torch.equal(*grads)

    chosen = torch.rand(n_tokens, n_experts).argsort(-1)[:, : arguments["top_k"]].contiguous()
    out = topk_route(logits, None, chosen_TK=chosen.to(place.device), backend=place.backend, **arguments)
    truth = logits.detach().double().cpu().requires_grad_()
    scores = truth.softmax(-1) if arguments.get("score_func") == "softmax" else truth.sigmoid()
    weight = scores.gather(1, chosen)
    weight = (weight / (weight.sum(-1, keepdim=True) + 1e-20) if normalise else weight) * scale
    assert torch.equal(out.topk_index_TK.cpu(), chosen)
    assert torch.equal(out.tokens_per_expert_E.cpu(), torch.bincount(chosen.flatten(), minlength=n_experts).int())
    place.agree("weights", weight, out.topk_weight_TK, FP32)
    place.agree(
        "d_logits",
        torch.autograd.grad(weight, truth, g_weight.cpu().double())[0],
        torch.autograd.grad(out.topk_weight_TK, logits, g_weight)[0],
    )


def test_choices_of_another_shape_are_refused(place: Any) -> None:
    """One sentence, before any kernel runs."""
    logits = torch.randn(4, 6, device=place.device)
    with pytest.raises(KernelError, match=r"chosen_TK is \(4, 3\) torch.int64: give \(4, 2\) torch.int64"):
        topk_route(logits, top_k=2, chosen_TK=torch.zeros(4, 3, dtype=torch.int64), backend=place.backend)
