"""grouped_gemm against a loop over experts in fp64: value and both gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import KernelError, grouped_gemm
from moe_kernels.gemm_triton import as_it_lies

# rows of each expert, inputs, outputs
CASES = {
    "one-row": ([1], 24, 20),
    "one-expert": ([63], 33, 5),
    "first-and-last-empty": ([0, 3, 1, 0], 24, 10),
    "all-on-one": ([0, 0, 63, 0], 16, 8),
    "several-tiles": ([130, 0, 7, 65], 40, 72),
    "odd": ([7, 1, 2], 7, 3),
    "tiles-of-64": ([90, 0, 40, 70], 64, 24),
    "tiles-of-128": ([400, 133], 72, 264),
}


def loop(x: Tensor, w: Tensor, rows: list[int]) -> Tensor:
    """The definition: each expert's rows times its transposed weight."""
    return torch.cat([part @ w[e].t() for e, part in enumerate(x.split(rows))])


def offsets_of(rows: list[int], device: str) -> Tensor:
    return torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32, device=device)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_the_loop(place: Any, leaf: Callable[..., Tensor], case: str) -> None:
    """y, dx and dw; experts without rows get gradient zero, exactly."""
    rows, n_in, n_out = CASES[case]
    x, w = leaf(sum(rows), n_in), leaf(len(rows), n_out, n_in, fan_in=n_in)
    y = grouped_gemm(x, w, offsets_of(rows, place.device), backend=place.backend)
    seed = torch.randn(y.shape).to(place.dtype)
    y.backward(seed.to(place.device))

    x64, w64 = (t.detach().cpu().double().requires_grad_() for t in (x, w))
    want = loop(x64, w64, rows)
    want.backward(seed.double())
    assert y.dtype == place.dtype
    place.agree("y", want, y)
    place.agree("dx", x64.grad, x.grad)
    place.agree("dw", w64.grad, w.grad)
    for e, n in enumerate(rows):
        assert n or not w.grad[e].any()


def test_worked_example(place: Any) -> None:
    """The numbers of the file's docstring."""
    w = torch.tensor([10.0, 20, 30], dtype=place.dtype, device=place.device).view(3, 1, 1).requires_grad_()
    x = torch.tensor([[1.0], [2], [3]], dtype=place.dtype, device=place.device)
    y = grouped_gemm(x, w, torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=place.device), backend=place.backend)
    assert y.flatten().tolist() == [10, 20, 90]
    y.backward(torch.ones_like(y))
    assert w.grad.flatten().tolist() == [3, 0, 3]


def test_strided_inputs_and_expanded_gradients(place: Any) -> None:
    """Any strides of x and w, and the gradient of a plain sum, which has stride zero."""
    x = torch.randn(16, 9, device=place.device).to(place.dtype).t().requires_grad_()
    w = (torch.randn(2, 16, 8, device=place.device) / 4).to(place.dtype).transpose(1, 2).requires_grad_()
    y = grouped_gemm(x, w, offsets_of([4, 5], place.device), backend=place.backend)
    y.sum().backward()
    place.agree("y", loop(x.double(), w.double(), [4, 5]), y)
    place.agree(
        "dx", torch.cat([part.double().sum(0).expand(n, 16) for n, part in zip((4, 5), w, strict=True)]), x.grad
    )
    want = torch.stack([part.double().sum(0).expand(8, 16) for part in x.split([4, 5])])
    place.agree("dw", want, w.grad)


def test_weights_of_any_strides_go_by_grouped_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of which neither side is contiguous: the loop would read the offsets on the host."""
    product, calls = torch.nn.functional.grouped_mm, []
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *args, **more: calls.append(1) or product(*args, **more)
    )
    x, w, offsets = torch.randn(9, 8), torch.randn(4, 16, 24), offsets_of([4, 5], "cpu")
    for given in (w[:2, :, :8], w[::2, :, :8], w[:1, :, :8].expand(2, -1, -1), w[:2, :8].mT[:, :16]):
        torch.testing.assert_close(grouped_gemm(x, given, offsets), loop(x, given, [4, 5]))
    assert len(calls) == 4


@pytest.mark.parametrize("case", ["odd", "tiles-of-64"])
def test_equal_inputs_give_equal_bits(place: Any, leaf: Callable[..., Tensor], case: str) -> None:
    """No sum depends on which program came first: values and gradients of two runs are the same."""
    rows, n_in, n_out = CASES[case]
    x, w, offsets = leaf(sum(rows), n_in), leaf(len(rows), n_out, n_in), offsets_of(rows, place.device)
    first, second = (
        torch.autograd.grad((y := grouped_gemm(x, w, offsets, backend=place.backend)).float().square().sum(), [y, x, w])
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("n_in", [24, 33], ids=["by-tma", "by-pointer"])
def test_an_expert_keeps_its_infinities(place: Any, leaf: Callable[..., Tensor], n_in: int) -> None:
    """Tiles reach over an expert's edges, into weights of the next that must not be multiplied, not even by zero."""
    x, w = leaf(12, n_in), leaf(3, 20, n_in)
    w.data[1] = torch.inf
    y = grouped_gemm(x, w, offsets_of([5, 0, 7], place.device), backend=place.backend)
    y.float().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()


def test_no_rows(place: Any, leaf: Callable[..., Tensor]) -> None:
    """Every parameter takes part in the backward even when nothing was routed here."""
    x, w = leaf(0, 8), leaf(3, 16, 8)
    y = grouped_gemm(x, w, offsets_of([0, 0, 0], place.device), backend=place.backend)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert x.grad.shape == (0, 8)
    assert not w.grad.any()


def test_only_what_is_needed_gets_a_gradient(place: Any, leaf: Callable[..., Tensor]) -> None:
    """A frozen weight costs no product and gets no gradient."""
    x, w = leaf(5, 8), leaf(2, 4, 8).detach()
    grouped_gemm(x, w, offsets_of([2, 3], place.device), backend=place.backend).sum().backward()
    assert x.grad is not None
    assert w.grad is None


def test_both_layouts_of_a_weight_are_read_in_place() -> None:
    """(E, O, I) and its transpose cost no copy; where a product's inputs lie is told, for either direction."""
    w = torch.empty(2, 3, 5)
    for view, transposed, inputs_last in (
        (w, False, True),
        (w, True, False),
        (w.transpose(1, 2), False, False),
        (w.transpose(1, 2), True, True),
    ):
        lying, last = as_it_lies(view, transposed)
        assert lying.data_ptr() == w.data_ptr()
        assert lying.is_contiguous()
        assert last == inputs_last
    copied, last = as_it_lies(w[:, ::2], False)
    assert copied.is_contiguous()
    assert last


def test_shapes_that_do_not_fit_are_refused() -> None:
    """One sentence with the shapes."""
    x, w, offsets = torch.zeros(4, 6), torch.zeros(2, 5, 6), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(KernelError, match="do not fit"):
        grouped_gemm(x[:, :5], w, offsets)
    with pytest.raises(KernelError, match="offsets_E1"):
        grouped_gemm(x, w, offsets[:2])
    with pytest.raises(KernelError, match="cast one"):
        grouped_gemm(x.bfloat16(), w, offsets)


def test_library_op_is_well_formed() -> None:
    """Schema, fake implementation and autograd registration agree; one node for torch.compile."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    offsets = offsets_of([2, 0, 4], "cpu")
    torch.library.opcheck(torch.ops.moe_kernels.grouped_gemm.default, (x, w, offsets, "torch"))

    def run(x: Tensor, w: Tensor) -> Tensor:
        return (grouped_gemm(x, w, offsets) ** 2).sum()

    want = torch.autograd.grad(run(x, w), [x, w])
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x, w), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("more", [0, 300], ids=["few-rows", "many-rows"])
def test_a_group_keeps_its_infinities(place: Any, leaf: Callable[..., Tensor], more: int) -> None:
    """Rows may be multiplied with neighbours beside them, and yet the neighbours' results are their own."""
    x, w = leaf(40 + 3 * more, 16).detach(), leaf(3, 8, 16)
    second, third, end = 10 + more, 25 + 2 * more, 30 + 3 * more
    x[second + 10] = torch.inf
    offsets = torch.tensor([0, second, third, end], dtype=torch.int32, device=place.device)
    y = grouped_gemm(x, w, offsets, backend=place.backend)
    assert y[: second + 10].isfinite().all()
    assert y[third:end].isfinite().all()
    y[:end].float().nansum().backward()
    assert w.grad is not None
    assert w.grad[0].isfinite().all()
    assert w.grad[2].isfinite().all()


@pytest.mark.gpu
def test_rows_past_two_to_the_31_elements() -> None:
    """Offsets are 64 bit: the last rows of a matrix of more than 2^31 elements come out right."""
    n_rows, n_in = 2**21 + 130, 1024
    x = torch.zeros(n_rows, n_in, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 3
    w = torch.full((2, 16, n_in), 2.0, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y = grouped_gemm(x, w, torch.tensor([0, 5, n_rows], dtype=torch.int32, device="cuda"), backend="triton")
    assert (y[-1] == 6).all()
    assert not y[:-1].any()
    y.backward(torch.ones_like(y))
    assert (w.grad[1, :, -1] == 3).all()
    assert not w.grad[0].any()
