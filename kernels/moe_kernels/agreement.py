"""Does Triton compute here what torch computes? What the self-checks of the ops share.

Compilers have miscompiled gradients on new devices without a word, and a loss curve shows it late or never. So each op
file has, beside its kernels, a probe: the op forward and backward on tiny problems, small enough for the first use in
every process. It runs on both sides and everything it returns must agree.

Routing and sorting: odd sizes, experts that have no rows, ties between scores. Products: problems for each family of
tile sizes, with more than one tile in each direction of every product, more than one step along every sum, the last
tile and step not whole, and more tiles than programs. Of the two widths one is a multiple of 16, as a model's are, and
one is not; in a family of its own neither is of whole 16 bytes.

A first use compiles all that a probe launches in one dtype, by several threads; later ones find it in Triton's cache.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._triton import INTERPRETED, VERSION
from .configs import capability_of, few_programs
from .errors import KernelError
from .launching import compile_ahead

__all__ = ["Check", "E", "K", "Probe", "Side", "T", "normal", "uniform", "widths"]

T, E, K = 37, 12, 3

# Largest error allowed, relative to the largest value of the reference: room for sums in another order and one rounding
# of intermediates to the dtype, far below what a wrong or missing tile gives.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def widths(block: int, aligned: bool) -> tuple[int, int]:
    """(D, F) of the problem for tiles of `block` rows, as `configs.families` has them."""
    if not aligned:
        return 67, 69
    return (256, 136) if block == 16 else (320, 264)


# In fp32, whatever torch's default dtype is.


def normal(*shape: int, make: torch.Generator) -> Tensor:
    """Normally distributed numbers on the CPU."""
    return torch.randn(shape, generator=make, dtype=torch.float32)


def uniform(*shape: int, make: torch.Generator) -> Tensor:
    """Numbers between 0 and 1 on the CPU."""
    return torch.rand(shape, generator=make, dtype=torch.float32)


class Side(NamedTuple):
    """Where a probe runs: the torch reference, on CPU in fp32, or Triton, on the device in the dtype under test."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    tested_dtype: torch.dtype

    def put(self, value: Tensor) -> Tensor:
        """`value` on this side, rounded to the tested dtype first, so that both sides see the same numbers."""
        return value.to(self.tested_dtype).to(self.device, self.dtype, copy=True)

    def leaf(self, value: Tensor) -> Tensor:
        """The same, to be differentiated in."""
        return self.put(value).requires_grad_()

    def master(self, value: Tensor) -> Tensor:
        """The same, kept in fp32."""
        return self._replace(dtype=torch.float32).leaf(value)


# Runs an op and returns its results and gradients by name. It calls the library op, which takes the backend as given:
# the public function would resolve it, and resolving is what waits for the check.
Probe = Callable[[Side], Mapping[str, Tensor | None]]


class Check(NamedTuple):
    """The self-check of one op."""

    op: str
    probe: Probe
    tolerance: Mapping[torch.dtype, float] = _TOLERANCE  # of each dtype it computes in; integers must be equal
    capability: tuple[int, int] = (0, 0)  # the least that has what the op needs; below it the op refuses to run

    def runs_on(self, device: torch.device) -> bool:
        """Has the device what the op needs?"""
        return capability_of(device) >= self.capability

    def run(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise KernelError if Triton disagrees in `dtype` with the torch reference on this device."""
        here = Side("triton", device, dtype, dtype)
        with _plain_torch(device), few_programs():
            if not INTERPRETED:
                with self._refusing(device), compile_ahead():
                    self.probe(here)
            wanted = self.probe(Side("torch", torch.device("cpu"), torch.float32, dtype))
            with self._refusing(device):
                found = self.probe(here)
            for name, want in wanted.items():
                _compare(f"{self.op} {name}", want, found[name], self.tolerance[dtype], device)

    @contextmanager
    def _refusing(self, device: torch.device) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a compiler's, a launch's: all mean that it does not work here
            raise KernelError(
                f"{self.op} cannot be run by triton {VERSION} on {device} ({error}): pass backend='torch' or "
                "install another triton"
            ) from error


@contextmanager
def _plain_torch(device: torch.device) -> Iterator[None]:
    """Whatever modes the caller is in, new tensors lie on CPU, have gradients and keep their dtype; and the backward
    pass is of this thread, whose launches `compile_ahead` and `few_programs` are about.

    The first use may be in a layer that is recomputed: nothing in here is that layer's, to be kept or made again.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept))
        modes.enter_context(_disable_current_modes())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        modes.enter_context(torch.autograd.set_multithreading_enabled(False))
        modes.enter_context(torch.autograd.set_detect_anomaly(False))  # what is only compiled leaves anything behind
        for kind in {"cpu", device.type}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        modes.enter_context(torch.device("cpu"))
        yield


def _compare(what: str, want: Tensor | None, got: Tensor | None, tolerance: float, device: torch.device) -> None:
    assert want is not None
    assert got is not None
    if want.is_floating_point():
        what = f"{what} in {str(got.dtype).removeprefix('torch.')}"
    else:
        tolerance = 0.0
    want, got = want.detach().double(), got.detach().cpu().double()
    error = ((want - got).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    if not error <= tolerance:  # also when it is NaN
        raise KernelError(
            f"{what} computed by triton {VERSION} on {device} is off by {error:.1e} of its largest value "
            f"(at most {tolerance:.0e} expected): pass backend='torch' or install another triton"
        )
