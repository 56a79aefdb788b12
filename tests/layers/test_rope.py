"""Rotary positions against their definition, a product with a complex number, in fp64: values and gradients."""

import pytest
import torch
from torch import Tensor

from moe.layers.rope import apply_rotary, rotary_tables

THETA = 100.0


def _turned(x: Tensor, turned: int, interleaved: bool) -> Tensor:
    """By definition, first coordinates of the pairs in front of their second."""
    plain, rest = x.split((x.shape[-1] - turned, turned), dim=-1)
    first, second = (rest[..., 0::2], rest[..., 1::2]) if interleaved else rest.chunk(2, dim=-1)
    position = torch.arange(x.shape[1], dtype=torch.float64)[:, None]
    angle = (position * THETA ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned))[:, None]
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((plain, product.real, product.imag), dim=-1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "turned"), [(8, 8), (11, 6), (2, 2)])
def test_equals_the_definition(width: int, turned: int, dtype: torch.dtype, interleaved: bool) -> None:
    """All coordinates turned, or only the last of an odd number."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, width).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found = apply_rotary(x, rotary_tables(torch.arange(7)[None], turned, THETA), interleaved=interleaved)
    wanted = _turned(exact, turned, interleaved)
    seed = torch.randn(found.shape).to(dtype)
    pairs = [(found, wanted), *zip(torch.autograd.grad(found, x, seed),
                                   torch.autograd.grad(wanted, exact, seed.double()), strict=True)]  # fmt: skip
    for got, want in pairs:
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_what_has_no_position_stays_to_the_bit() -> None:
    """In front of the pairs."""
    x = torch.randn(1, 5, 2, 10)
    out = apply_rotary(x, rotary_tables(torch.arange(5)[None], 4, THETA), interleaved=True)
    assert torch.equal(out[..., :6], x[..., :6])
    assert not torch.equal(out[..., 6:], x[..., 6:])


def test_torch_func_differentiates_it() -> None:
    """A rotation keeps lengths: the gradient of the squared length is twice what went in."""
    x, rotary = torch.randn(1, 5, 2, 10), rotary_tables(torch.arange(5)[None], 4, THETA)
    found = torch.func.grad(lambda given: apply_rotary(given, rotary, interleaved=True).square().sum())(x)
    torch.testing.assert_close(found, 2 * x)
