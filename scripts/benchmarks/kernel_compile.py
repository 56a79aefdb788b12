"""Compile a recorded launch for a GPU that is not there, specialised as Triton does at run time, and read the result.

Triton's wheel carries ptxas, cuobjdump and nvdisasm, so registers, stack (spills), shared memory and the instructions
are known without a GPU.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import triton
from kernel_launches import DEVICES, OPTIONS, Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

__all__ = ["WARPS", "Compiled", "compile_launch", "declared_partitions", "fits", "identity"]

REGISTERS, WARPS, BLOCKS, SHARED_RESERVED = 65536, 64, 32, 1024  # of a multiprocessor; bytes reserved a block
SHARED_PER_PROCESSOR = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# SASS -> unit
PRODUCTS = {
    "HGMMA": "wgmma",
    "QGMMA": "wgmma fp8",
    "UTCHMMA": "tcgen05",
    "UTCQMMA": "tcgen05 fp8",
    "HMMA": "mma",
    "QMMA": "mma fp8",
}


class Compiled(NamedTuple):
    """What the compiler made of a launch.

    stack       bytes of local memory a thread needs: anything above 0 is spilled registers
    warps       of a block, those of specialised partitions included
    occupancy   resident warps over the most a multiprocessor can hold
    unit        that multiplies matrices: wgmma (sm_90), tcgen05 (sm_100), mma; empty when none does
    partitions  how many warp-specialised partitions the program has beside its main one
    chained     8-bit wgmma instructions in a row that add to one another, each of 32 products; 0 when there is none
    """

    registers: int
    stack: int
    shared: int
    warps: int
    occupancy: float
    unit: str
    partitions: int
    chained: int


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability `arch` / 10. Raises what Triton raises."""
    target = GPUTarget("cuda", arch, 32)
    source, options = _specialised(launch, target)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
        sass = _tool("cuobjdump", "-sass", str(cubin))
    assert usage, f"cuobjdump says no resources of {launch.name}"
    registers, stack = int(usage[1]), int(usage[2])
    found = re.search(r"\.maxntid (\d+)|\.reqntid (\d+)", compiled.asm["ptx"])
    warps = int(found[1] or found[2]) // 32 if found else compiled.metadata.num_warps
    unit = next((name for word, name in PRODUCTS.items() if re.search(rf"\b{word}\b", sass)), "")
    partitions = len(set(re.findall(r"\bpartition(\d+)\(", compiled.asm["ttgir"])))
    shared = compiled.metadata.shared
    occupancy = _occupancy(arch, registers, shared, warps)
    return Compiled(registers, stack, shared, warps, occupancy, unit, partitions, _chained(sass))


def _chained(sass: str) -> int:
    """The longest run of 8-bit wgmma in the program's order of which only the first starts from zero (RZ).

    A program whose first one starts from a register has a sum without an end: all of them count.
    """
    starts = ["RZ" in line for line in sass.splitlines() if re.search(r"\bQGMMA\b", line)]
    if not starts or not starts[0]:
        return len(starts)
    firsts = [n for n, zero in enumerate(starts) if zero]
    return max(b - a for a, b in pairwise([*firsts, len(starts)]))


def identity(launch: Launch, arch: int) -> str:
    """Equal for launches that are one and the same compiled kernel."""
    source, options = _specialised(launch, GPUTarget("cuda", arch, 32))
    told = {name: options[name] for name in OPTIONS}
    return hashlib.sha256(f"{launch.name} {source.hash()} {json.dumps(told)} {arch}".encode()).hexdigest()


def _specialised(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """Signature, constants and divisibility by 16, by Triton's own rules."""
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.options, "debug": False}
    arguments, specialisation, _ = bind(**launch.values, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, arguments, specialisation, _)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def _occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    """By registers (given out to warps 256 at a time), shared memory, threads and blocks of a multiprocessor."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED_PER_PROCESSOR[arch] // (shared + SHARED_RESERVED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def declared_partitions(launch: Launch) -> bool:
    """Whether the kernel asks for warp specialisation in this launch, by its own text."""
    asked = re.search(r"warp_specialize=(\w+)", launch.kernel.src)
    return asked is not None and bool(launch.values[asked[1]])


def fits(compiled: Compiled, arch: int) -> bool:
    """Whether a block's shared memory is within what the device gives."""
    return compiled.shared <= DEVICES[arch][1]


def _tool(name: str, *words: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True, timeout=60).stdout
