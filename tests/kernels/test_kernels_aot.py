"""Every kernel, as its launcher launches it, compiled for GPUs that are not there: it fits, and uses the right unit.

Public ops are called on tensors without memory that say they lie on a GPU of the architecture; what would be launched
is recorded, specialised as Triton does at run time, and compiled. So a kernel or a configuration is tested here as soon
as a call of `scripts/benchmarks/kernel_work.py` launches it.
"""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_kernels._triton import HAVE_TRITON, INTERPRETED

if not HAVE_TRITON or INTERPRETED:
    pytest.skip("runs on Linux in the process of scripts/test that compiles: pytest -m aot", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from kernel_compile import WARPS, Compiled, compile_launch, declared_partitions, fits, identity
from kernel_launches import DEVICES, Glue, Launch, described, record
from kernel_work import WORK, architectures

pytestmark = pytest.mark.aot

MOST_COMPILES = 212  # of all tests here together: each takes half a second or more
ODD = {"odd", "odd/4-rows-an-expert", "fp8/odd"}  # without vector loads anything is slow; it must be right
UNIT = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}
STEPS = 128 // 32  # of 8-bit wgmma between two additions in fp32: Hopper's own sums keep some 14 bits

compiled: dict[str, Compiled] = {}


@pytest.mark.parametrize(
    ("name", "arch"),
    [pytest.param(name, arch, id=f"{name}-sm_{arch}") for name in WORK for arch in architectures(name)],
)
def test_kernels_compile_and_fit(name: str, arch: int) -> None:
    """No spills, shared memory within the device, the matrix unit for 16-bit products, partitions where declared; no
    more persistent programs than run at once."""
    launches = [launch for launch in record(WORK[name], arch) if isinstance(launch, Launch)]
    assert launches
    faults = []
    for launch in launches:
        key = identity(launch, arch)
        if key not in compiled:
            assert len(compiled) < MOST_COMPILES, "too many configurations: compile fewer of them here"
            compiled[key] = compile_launch(launch, arch)
            found = faults_of(launch, compiled[key], arch, may_spill=name in ODD)
            faults += [f"{launch.name} ({described(launch)}): {fault}" for fault in found]
    assert not faults, "\n".join(faults)


def faults_of(launch: Launch, found: Compiled, arch: int, *, may_spill: bool) -> list[str]:
    """What a compiled kernel lacks."""
    faults = []
    if found.stack and not may_spill:
        faults.append(f"spills: {found.stack} bytes of stack a thread")
    if not fits(found, arch):
        faults.append(f"{found.shared} bytes of shared memory, {DEVICES[arch][1]} are there")
    in_16_bits = {t.dtype for t in launch.tensors.values()} & {torch.bfloat16, torch.float16}
    # wgmma and tcgen05 multiply 64 rows or more at a time; tiles of 16 are for where memory is the limit
    unit = UNIT[arch] if launch.values.get("BM", 64) >= 64 else "mma"
    in_8_bits = torch.float8_e4m3fn in {t.dtype for t in launch.tensors.values()}
    if in_8_bits:
        unit += " fp8"
        if multiplies(launch) and unit == "wgmma fp8" and found.chained != STEPS:
            faults.append(f"{found.chained} products of 32 numbers add to one another, not {STEPS}")
    if multiplies(launch) and (in_16_bits or in_8_bits) and found.unit != unit:
        faults.append(f"multiplies with {found.unit or 'no matrix unit'}, not {unit}")
    at_once = round(found.occupancy * WARPS / found.warps)  # blocks of a multiprocessor
    if "tl.num_programs(" in launch.kernel.src and math.prod(launch.grid) > at_once * DEVICES[arch][0]:
        faults.append(f"{math.prod(launch.grid)} persistent programs, and {at_once} run on a multiprocessor")
    if declared_partitions(launch) and not found.partitions:
        faults.append("declares warp specialisation, and the compiler made no partition")
    return faults


def multiplies(launch: Launch) -> bool:
    """Whether the kernel has a matrix product, by its own text."""
    return "tl.dot(" in launch.kernel.src


def test_all_kernels_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of the package is forgotten here: each is launched, or called by one that is."""
    import importlib
    import pkgutil

    import moe_kernels

    launched = {launch.name for name in WORK for launch in record(WORK[name], 90) if isinstance(launch, Launch)}
    for module in pkgutil.iter_modules(moe_kernels.__path__):
        for name in vars(importlib.import_module(f"moe_kernels.{module.name}")):
            if name.endswith("_kernel"):
                assert name in launched


def test_recording_knows_the_architecture() -> None:
    """What launchers ask of CUDA is the architecture's, and nothing stays changed afterwards."""
    asked: list[Any] = []

    def work() -> None:
        x = torch.empty(4, 4, device="cuda")
        asked.append((x.is_cuda, x.device.type, torch.cuda.get_device_capability(x.device)))
        asked.append(torch.cuda.get_device_properties(0).multi_processor_count)
        x.index_select(0, torch.empty(2, dtype=torch.int64, device="cuda"))

    found = record(work, 100)
    assert asked == [(True, "cuda", (10, 0)), 148]
    assert found == [Glue("index_select", 4 * 16 + 8 * 2 + 4 * 8)]
    assert not torch.empty(1).is_cuda
