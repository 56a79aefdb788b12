"""Where the kernel tests run: one fixture says backend, device, dtype, so one test serves CPU, interpreter and GPU."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_kernels.configs import obstacle_to_fp8

# Largest error allowed, relative to the largest value of the fp64 reference. Inputs are scaled so that values are near
# one; the bound leaves room for another order of summation (fp32) or for three roundings to the dtype between x and the
# gradients (fp16 has 11 bits of mantissa, bf16 8), and is far below what one wrong row or tile gives.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Place:
    """One way of running an op."""

    backend: str
    device: str
    dtype: torch.dtype

    def agree(self, name: str, want: Tensor, got: Tensor, tolerance: float | None = None) -> None:
        """Assert that `got` is within this place's tolerance of the fp64 reference `want`."""
        assert got is not None, name
        assert want.shape == got.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if want.numel() == 0:
            return
        want, got = want.detach().cpu().double(), got.detach().cpu().double()
        error = ((want - got).abs().max() / want.abs().max().clamp(min=1e-3)).item()
        bound = TOLERANCE[self.dtype] if tolerance is None else tolerance
        assert error <= bound, f"{name} is off by {error:.1e}, allowed {bound:.1e}"


PLACES = [
    pytest.param(Place("torch", "cpu", torch.float32), id="torch-cpu-fp32"),
    pytest.param(Place("torch", "cpu", torch.bfloat16), id="torch-cpu-bf16"),
    pytest.param(Place("triton", "cpu", torch.float32), id="interpreter-fp32", marks=pytest.mark.interpreter),
    pytest.param(Place("triton", "cpu", torch.float16), id="interpreter-fp16", marks=pytest.mark.interpreter),
    pytest.param(Place("torch", "cuda", torch.bfloat16), id="torch-cuda-bf16", marks=pytest.mark.gpu),
    pytest.param(Place("triton", "cuda", torch.float32), id="triton-cuda-fp32", marks=pytest.mark.gpu),
    pytest.param(Place("triton", "cuda", torch.bfloat16), id="triton-cuda-bf16", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton decides when a kernel is defined whether it is interpreted, so each way needs its own process."""
    for item in items:
        if item.get_closest_marker("interpreter") and not INTERPRETED:
            item.add_marker(
                pytest.mark.skip(reason="runs in its own process: TRITON_INTERPRET=1 pytest -m interpreter")
            )
        if item.get_closest_marker("gpu") and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, outside Triton's interpreter"))


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Backend, device and dtype under test."""
    return request.param


@pytest.fixture
def device_with_fp8(request: pytest.FixtureRequest) -> None:
    """Nothing on a GPU whose tensor cores take no E4M3."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu and torch.cuda.is_available() and (lack := obstacle_to_fp8(torch.device("cuda"))):
        pytest.skip(lack)


@pytest.fixture
def on_cpu() -> Place:
    """The torch path in fp32, for what does not depend on the backend."""
    return Place("torch", "cpu", torch.float32)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: their maximum), so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def leaf(place: Place) -> Callable[..., Tensor]:
    """Make a leaf of given shape, near one over the square root of `fan_in`, rounded to the dtype under test."""

    def make(*shape: int, fan_in: int = 1) -> Tensor:
        value = torch.randn(*shape, dtype=torch.float64) / fan_in**0.5
        return value.to(place.dtype).to(place.device).requires_grad_()

    return make
