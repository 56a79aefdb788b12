"""The gradient's norm in fp64, and scaling by it."""

import pytest
import torch
from torch import nn

from moe.parallel.clipping import scale, sum_of_squares


@pytest.mark.parametrize("sizes", [[], [(0,)], [(1,)], [(7, 3), (2**18 + 5,), (0, 4)]])
def test_the_norm_is_exact(sizes: list[tuple[int, ...]]) -> None:
    """Over several chunks, and of tensors whose memory is not in one row."""
    gradients = [torch.randn(size) for size in sizes] + [torch.randn(5, 6).t()]
    want = sum(float((g.double() ** 2).sum()) for g in gradients)
    assert float(sum_of_squares(gradients)) == pytest.approx(want, rel=1e-12)
    assert float(sum_of_squares([])) == 0


def test_the_norm_does_not_depend_on_how_the_gradient_is_cut() -> None:
    """As fp32, in which it is used; torch's own fp32 sum of the same entries does depend on it."""
    gradient = torch.randn(2**22) + 1
    norms = {sum_of_squares(list(gradient.split(size))).sqrt().float().item() for size in (2**22, 999_999, 2**15, 4096)}
    assert len(norms) == 1
    assert nn.utils.get_total_norm([gradient]).item() not in norms


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_scales_as_torch_does(max_norm: float) -> None:
    """Down to the norm, never up."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 50)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ours = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    scale(ours, sum_of_squares(ours).sqrt().float(), max_norm)
    nn.utils.clip_grad_norm_(parameters, max_norm)
    for parameter, gradient in zip(parameters, ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
