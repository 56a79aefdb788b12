"""The router's own product: in fp32 whatever comes in, and nothing kept that is not needed."""

import pytest
import torch
from torch import Tensor

from moe.layers import Router

CASES = {"bf16": (torch.bfloat16, torch.bfloat16), "bf16-x": (torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_keeps_x_in_its_own_dtype(case: str, autocast: bool) -> None:
    """A fp32 copy of x would be twice as large as x; scores and gradients are those of a product in fp32."""
    x_dtype, weight_dtype = CASES[case]
    router = Router(16, 6, 2).to(weight_dtype)
    x = torch.randn(50, 16).to(x_dtype).requires_grad_()
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        route = router(x)
    assert {t.dtype for t in kept if t.shape == x.shape} == {x_dtype}

    copies = [t.detach().float().requires_grad_() for t in (x, router.weight)]
    scores = (copies[0] @ copies[1].t()).sigmoid()
    torch.testing.assert_close(route.scores_TE, scores)
    seed = torch.randn(50, 6)
    want = torch.autograd.grad(scores, copies, seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # a backward pass within it changes nothing
        got = torch.autograd.grad(route.scores_TE, [x, router.weight], seed)
    for a, b, leaf in zip(want, got, (x, router.weight), strict=True):
        assert b.dtype == leaf.dtype
        torch.testing.assert_close(b, a.to(leaf.dtype))


def test_frozen_router_leaves_x_its_gradient() -> None:
    """And a detached x the router its own."""
    router, x = Router(16, 6, 2).bfloat16(), torch.randn(5, 16, dtype=torch.bfloat16)
    first_T = router(x).topk_weight_TK[:, 0]  # all weights of a token sum to a constant
    (gradient,) = torch.autograd.grad(first_T.sum(), router.weight)
    assert gradient.any()
    router.requires_grad_(False)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(router(x).scores_TE.sum(), x)
    assert gradient.any()
