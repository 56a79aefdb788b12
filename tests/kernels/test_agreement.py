"""What the self-check runs on a GPU, from the launches that it would make there."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_kernels._triton import HAVE_TRITON, INTERPRETED

if not HAVE_TRITON or INTERPRETED:
    pytest.skip("runs on Linux in the process of scripts/test that compiles: pytest -m aot", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from kernel_compile import identity
from kernel_launches import Launch, record

from moe_kernels import selfcheck  # noqa: F401 (registers all checks)
from moe_kernels.agreement import Check, Side
from moe_kernels.backend import registered_checks
from moe_kernels.configs import families

pytestmark = pytest.mark.aot

MOST_KERNELS = 90  # of an op in a dtype, for which someone waits: half a second each, on up to 16 threads
PARTS = {  # kernel -> (size, step) along everything that is cut into tiles or steps, its rows aside
    "product_kernel": (("n_out", "BN"), ("n_in", "BK")),
    "swiglu_kernel": (("n_hidden", "BN"), ("n_in", "BK")),
    "swiglu_backward_kernel": (("n_hidden", "BN"), ("n_in", "BK")),
    "wgrad_kernel": (("n_out", "BO"), ("n_in", "BI")),
}


Found = dict[tuple[str, torch.dtype], dict[str, Launch]]


@pytest.fixture(scope="module", params=[80, 90, 100])
def found(request: pytest.FixtureRequest) -> Found:
    """Every kernel that the self-check of an op compiles in a dtype, once."""
    cuda = torch.device("cuda", 0)
    compiled: Found = {}
    for check in registered_checks():
        for dtype in check.tolerance:
            here = Side("triton", cuda, dtype, dtype)

            def probe(check: Check = check, here: Side = here) -> None:
                with torch.autograd.set_multithreading_enabled(False):
                    check.probe(here)

            steps = [step for step in record(probe, request.param) if isinstance(step, Launch)]
            compiled[check.op, dtype] = {identity(step, request.param): step for step in steps}
    return compiled


@pytest.fixture(scope="module")
def launches(found: Found) -> dict[str, Launch]:
    """Those of all ops and dtypes."""
    return {key: launch for launches in found.values() for key, launch in launches.items()}


def test_number_of_kernels_is_bounded(found: Found) -> None:
    """They are compiled at the first use on a new machine, when someone waits. Who trains in bf16 waits for two of the
    checks: routing by fp32 logits, and the experts."""
    assert max(map(len, found.values())) <= MOST_KERNELS
    first_use = found["topk_route", torch.float32] | found["expert_mlp", torch.bfloat16]
    assert 80 < len(first_use) <= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_family_has_each_option(found: Found, dtype: torch.dtype) -> None:
    """Of the experts' kernels: weights either way round, all or two places of the routing weight, h stored or not,
    gradients of the weights in the activations' dtype or in fp32."""
    options: dict[tuple[str, Any], set[Any]] = {}
    for launch in found["expert_mlp", dtype].values():
        values = launch.values
        for name in ("INPUTS_LAST", "WEIGHTING", "KEEP"):
            if name in values:
                family = (values["BM"], values["UNIT"] > 1)
                options.setdefault((f"{launch.name} {name}", family), set()).add(values[name])
                options.setdefault((f"{launch.name} {name}", values["UNIT"] > 1), set()).add(values[name])
        if launch.name == "wgrad_kernel":
            gathered = "dy" if values["GATHER_DY"] else "x"
            family = (values["BR"], values["UNIT"] > 1)
            options.setdefault((f"gathered {gathered}", family), set()).add(values["p_dw"].dtype)
    assert len({family for name, family in options if isinstance(family, tuple) and "product" in name}) == len(
        families(dtype)
    )
    for (name, family), seen in options.items():
        if "gathered" in name:
            assert seen == {dtype, torch.float32}, (name, family)
        elif name.endswith("WEIGHTING"):
            others = {"before", "none"} if isinstance(family, bool) else seen & {"before", "none"}
            assert others
            assert seen == {"after"} | others, (name, family)
        else:
            assert seen == {True, False}, (name, family)


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
