"""topk_route's statistics against Python's own counting and fp64; gradients through the shares."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import KernelError, topk_route_with_statistics
from moe_kernels.routing_statistics import MARGIN_BINS, MARGIN_REACH, MARGIN_WIDTH

FP32 = 1e-5  # routing is fp32 whatever the dtype of the logits

# tokens, sequences, experts, arguments
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "one-token": (1, 1, 5, {"top_k": 2}),
    "odd": (63, 3, 24, {"top_k": 3}),
    "sequences-of-one": (5, 5, 9, {"top_k": 2, "routed_scaling_factor": 2.5}),
    "softmax": (34, 2, 33, {"top_k": 4, "score_func": "softmax"}),
    "one-expert": (6, 2, 1, {"top_k": 1}),
    "all-experts": (6, 2, 4, {"top_k": 4}),
    "groups": (30, 2, 12, {"top_k": 3, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2}),
    "many-experts": (5, 1, 512, {"top_k": 10, "score_func": "softmax", "norm_topk_prob": False}),
}


def _largest(row: Tensor, k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda e: (-float(row[e]), e))[:k]


def _positions(biased: Tensor, k: int) -> Tensor:
    """Where each margin lies among the bins, fp64 (T, E)."""
    ordered = biased.double().sort(descending=True).values
    margin = ordered[:, k : k + 1] - biased.double()
    return (torch.asinh(margin / MARGIN_WIDTH) / MARGIN_REACH + 1) * MARGIN_BINS / 2


def _count(bins: Tensor) -> Tensor:
    return torch.stack([torch.bincount(of.clamp(0, MARGIN_BINS - 1), minlength=MARGIN_BINS) for of in bins.t()])


@pytest.mark.parametrize("how", ["plain", "bias-padding", "chosen-padding"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_counting_by_hand(place: Any, case: str, how: str) -> None:
    """Load, preferred experts and margins exactly, shares and their gradient to rounding; routing is as without."""
    n_tokens, sequences, n_experts, arguments = CASES[case]
    top_k, length = arguments["top_k"], n_tokens // sequences
    padded = how != "plain"
    margins = top_k < n_experts and "n_group" not in arguments
    logits = torch.randn(n_tokens, n_experts).to(place.dtype).to(place.device).requires_grad_()
    bias = None if how == "plain" else torch.randn(n_experts, device=place.device)
    chosen = torch.rand(n_tokens, n_experts).argsort(-1)[:, :top_k].contiguous().to(place.device)
    counted = [not padded or t % 3 != 1 for t in range(n_tokens)]
    route, statistics = topk_route_with_statistics(
        logits,
        bias,
        chosen_TK=chosen if how == "chosen-padding" else None,
        counted_T=torch.tensor(counted, device=place.device) if padded else None,
        count_margins=margins,
        sequences=sequences,
        backend=place.backend,
        **arguments,
    )
    scores, index = route.scores_TE.detach().cpu(), route.topk_index_TK.cpu()
    load = Counter(e for t in range(n_tokens) if counted[t] for e in index[t].tolist())
    assert statistics.load_E.tolist() == [load[e] for e in range(n_experts)]
    assert int(route.tokens_per_expert_E.sum()) == n_tokens * top_k
    for b in range(sequences):
        tokens = [t for t in range(b * length, (b + 1) * length) if counted[t]]
        preferred = Counter(e for t in tokens for e in _largest(scores[t], top_k))
        assert statistics.preferred_BE[b].tolist() == [preferred[e] for e in range(n_experts)]
    if margins:
        position = _positions(scores if bias is None else scores + bias.cpu(), top_k)[counted]
        border = int(((position - 1e-3).int() != (position + 1e-3).int()).sum())  # may round into either bin
        found = statistics.margins_EM.cpu()
        assert torch.equal(found.sum(1), torch.full((n_experts,), sum(counted)))
        # a margin of 0, the first expert left out, opens its bin exactly
        assert int((found - _count(position.int())).abs().sum()) <= 2 * (border - sum(counted))
    else:
        assert statistics.margins_EM is None

    truth = logits.detach().double().cpu().requires_grad_()
    exact = truth.softmax(-1) if arguments.get("score_func") == "softmax" else truth.sigmoid()
    weight = exact.gather(1, index)
    if arguments.get("norm_topk_prob", True):
        weight = weight / weight.sum(-1, keepdim=True)
    weight = weight * arguments.get("routed_scaling_factor", 1.0)
    shares = exact / exact.sum(-1, keepdim=True) * torch.tensor(counted).double().unsqueeze(1)
    shares = shares.view(sequences, length, n_experts).sum(1)
    place.agree("shares", shares, statistics.shares_BE, FP32)
    ends, found_ends = [shares, exact, weight], [statistics.shares_BE, route.scores_TE, route.topk_weight_TK]
    for some in (slice(1), slice(3)):  # alone, and with the other outputs' gradients
        seeds = [torch.randn(end.shape) for end in ends[some]]
        want = torch.autograd.grad(ends[some], truth, [g.double() for g in seeds], retain_graph=True)[0]
        seeds = [g.to(place.device) for g in seeds]
        got = torch.autograd.grad(found_ends[some], logits, seeds, retain_graph=True)[0]
        if n_experts > 1 or some.stop == 3:  # of one expert the share is 1, whatever the logit
            place.agree("d_logits", want, got)


def test_worked_example(place: Any) -> None:
    """The numbers of the file's docstring; margin 0 opens the upper half of the bins."""
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().to(place.device)
    out = topk_route_with_statistics(
        logits, top_k=1, score_func="softmax", count_margins=True, sequences=1, backend=place.backend
    )[1]
    assert out.preferred_BE.tolist() == [[1, 0, 0]]
    place.agree("shares", torch.tensor([[0.6, 0.3, 0.1]]), out.shares_BE, FP32)
    bins = out.margins_EM.argmax(1).tolist()
    assert bins[1] == MARGIN_BINS // 2
    for e, margin in ((0, -0.3), (2, 0.2)):
        assert bins[e] == int((math.asinh(margin / MARGIN_WIDTH) / MARGIN_REACH + 1) * MARGIN_BINS / 2)


def test_ties_everywhere_are_counted_alike(place: Any) -> None:
    """Equal scores: the lowest numbers are preferred, and every margin is 0."""
    logits = torch.zeros(6, 5, device=place.device)
    out = topk_route_with_statistics(logits, top_k=2, count_margins=True, sequences=2, backend=place.backend)[1]
    assert out.preferred_BE.tolist() == [[3, 3, 0, 0, 0]] * 2
    assert out.margins_EM[:, MARGIN_BINS // 2].tolist() == [6] * 5


def test_no_tokens_give_zeros(place: Any) -> None:
    """A rank without tokens adds nothing."""
    out = topk_route_with_statistics(
        torch.empty(0, 4, device=place.device), top_k=2, count_margins=True, sequences=1, backend=place.backend
    )[1]
    assert out.shares_BE.tolist() == [[0.0] * 4]
    assert not out.preferred_BE.any()
    assert not out.margins_EM.any()


def test_scores_that_are_no_numbers_stay_in_range(place: Any) -> None:
    """Infinite logits are scores 1 and 0; NaN is counted somewhere, and never outside the arrays."""
    logits = torch.full((4, 6), float("nan"), device=place.device)
    logits[:2] = torch.tensor([math.inf, -math.inf, 0, 0, 1, -1])
    route, out = topk_route_with_statistics(logits, top_k=2, count_margins=True, sequences=2, backend=place.backend)
    assert route.scores_TE[:2, :2].tolist() == [[1.0, 0.0]] * 2
    assert route.topk_index_TK[:2].tolist() == [[0, 4]] * 2
    assert out.margins_EM.sum(1).tolist() == [4] * 6
    assert out.preferred_BE.sum(1).tolist() == [4, 4]
    shares = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.7310586, 0.2689414])
    place.agree("shares", 2 * shares / shares.sum(), out.shares_BE[0], FP32)


def test_statistics_are_the_same_at_every_run(place: Any) -> None:
    """Bit for bit, the fp32 shares too."""
    logits = torch.randn(300, 16, device=place.device)
    runs = [topk_route_with_statistics(logits, top_k=2, sequences=3, backend=place.backend)[1] for _ in range(2)]
    assert torch.equal(runs[0].shares_BE, runs[1].shares_BE)


@pytest.mark.gpu
def test_addresses_beyond_32_bits() -> None:
    """More than 2**31 scores: the last tokens are routed as they are alone."""
    n_experts = 512
    logits = torch.randn(2**31 // n_experts + 3, n_experts, device="cuda", dtype=torch.bfloat16)
    tail = slice(-5, None)
    whole = topk_route_with_statistics(logits, top_k=2, count_margins=True)[0]
    alone = topk_route_with_statistics(logits[tail], top_k=2, count_margins=True)[0]
    assert torch.equal(whole.topk_index_TK[tail], alone.topk_index_TK)
    assert torch.equal(whole.scores_TE[tail], alone.scores_TE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"counted_T": torch.ones(3, dtype=torch.bool)}, r"counted_T is \(3,\) torch.bool: give \(4,\)"),
        ({"counted_T": torch.ones(4)}, r"counted_T is \(4,\) torch.float32"),
        ({"sequences": 3}, "sequences=3 must divide the 4 tokens"),
        ({"count_margins": True, "top_k": 8}, "top_k=8 of 8 experts"),
        ({"count_margins": True, "topk_method": "noaux_tc", "n_group": 2, "topk_group": 2}, "n_group=2"),
    ],
)
def test_wrong_arguments_name_value_and_mend(arguments: dict[str, Any], words: str) -> None:
    """One sentence with what was given."""
    with pytest.raises(KernelError, match=words):
        topk_route_with_statistics(torch.zeros(4, 8), **({"top_k": 2} | arguments))


def test_library_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree with everything asked for."""
    logits, counted = torch.randn(6, 8, requires_grad=True), torch.tensor([True, False] * 3)
    given = (torch.randn(8), None, counted, 2, "softmax", "noaux_tc", 1, 1, True, 2.5, True, 3, "torch")
    torch.library.opcheck(torch.ops.moe_kernels.topk_route.default, (logits, *given))


def test_compiles_as_one_graph() -> None:
    """torch.compile(fullgraph=True) sees one node and gives the same gradients."""

    def share(logits: Tensor) -> Tensor:
        route, out = topk_route_with_statistics(logits, top_k=2, count_margins=True, sequences=2)
        return (out.shares_BE**2).sum() + (route.topk_weight_TK**2).sum() + out.margins_EM[0].sum()

    plain = torch.randn(6, 8, requires_grad=True)
    traced = plain.detach().clone().requires_grad_()
    share(plain).backward()
    torch.compile(share, fullgraph=True, backend="aot_eager")(traced).backward()
    assert torch.equal(plain.grad, traced.grad)
