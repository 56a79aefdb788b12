"""What the self-check runs on a GPU, from the launches that it would make there."""

import sys
from pathlib import Path

import pytest
import torch

from moe_kernels._triton import HAVE_TRITON, INTERPRETED

if not HAVE_TRITON or INTERPRETED:
    pytest.skip("runs on Linux in the process of scripts/test that compiles: pytest -m aot", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from kernel_compile import identity
from kernel_launches import Launch, record

from moe_kernels import selfcheck  # noqa: F401 (registers all checks)
from moe_kernels.agreement import Side
from moe_kernels.backend import registered_checks

pytestmark = pytest.mark.aot

MOST_KERNELS = 85  # half a second each, on up to 16 threads
PARTS = {  # kernel -> (size, step) along everything that is cut into tiles or steps, its rows aside
    "product_kernel": (("n_out", "BN"), ("n_in", "BK")),
    "swiglu_kernel": (("n_hidden", "BN"), ("n_in", "BK")),
    "swiglu_backward_kernel": (("n_hidden", "BN"), ("n_in", "BK")),
    "wgrad_kernel": (("n_out", "BO"), ("n_in", "BI")),
}


@pytest.fixture(scope="module", params=[80, 90, 100])
def launches(request: pytest.FixtureRequest) -> dict[str, Launch]:
    """Every kernel that the self-check compiles, once."""
    cuda = torch.device("cuda", 0)

    def probe() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            for check in registered_checks():
                for dtype in check.tolerance:
                    check.probe(Side("triton", cuda, dtype, dtype))

    found = [step for step in record(probe, request.param) if isinstance(step, Launch)]
    return {identity(launch, request.param): launch for launch in found}


def test_number_of_kernels_is_bounded(launches: dict[str, Launch]) -> None:
    """They are compiled at the first use on a new machine, when someone waits."""
    assert 60 < len(launches) <= MOST_KERNELS


def test_products_have_several_tiles_and_steps(launches: dict[str, Launch]) -> None:
    """In each direction, the last of them not whole in one at least; with whole steps and with masked ones."""
    even = set()
    for launch in launches.values():
        values = launch.values
        sizes = [(values[size], values[step]) for size, step in PARTS.get(launch.name, ())]
        assert all(size > step for size, step in sizes), (launch.name, sizes)
        assert not sizes or any(size % step for size, step in sizes), (launch.name, sizes)
        if "EVEN" in values:
            even.add((launch.name, values["EVEN"]))
    assert even == {(name, whole) for name in PARTS if name != "wgrad_kernel" for whole in (True, False)}
