"""Tile sizes of the grouped products: one table, by kernel, dtype, GPU and rows per expert.

A table and no autotuner: tuning at run time times candidates, hence waits for the device in the first steps, and two
ranks may choose differently, whose sums then differ in the last bit. The reasons are counted, not measured, from what a
multiprocessor of an H100 or H200 has: 65,536 registers, 227 KiB of shared memory, 4,096 bf16 FLOP a cycle. A tile of
M x N makes M N / (M + N) FLOP of each byte it loads in 16 bits, and at full speed needs so many bytes a cycle from L2:

    128 x 256   85 FLOP/B   48 B     the most that two warpgroups' registers hold
    128 x 128   64 FLOP/B   64 B
     64 x 256   51 FLOP/B   80 B
     16 x 128   14 FLOP/B            enough where device memory is the limit, see below

Rows of an expert past a whole tile are multiplied in vain, half a tile on average: 128 rows waste 25 % at 256 rows per
expert, 64 rows 12 %. With r rows per expert a weight element is used r times, r FLOP/B of device memory, against 181
that an H200 wants; far below it only the bytes in flight count, and tiles are 16 rows high, the least of `mma`.

fp32 is multiplied in fp32 (`ieee`), not TF32: no tensor cores, the same small tiles everywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import NamedTuple

import torch

from ._triton import INTERPRETED

__all__ = [
    "FP8_CAPABILITY",
    "Config",
    "capability_of",
    "config_for",
    "families",
    "few_programs",
    "n_programs",
    "obstacle_to_fp8",
    "row_block",
]


class Config(NamedTuple):
    """How one kernel is launched."""

    rows: int  # tile of the result
    cols: int  # of each half, where a kernel makes gate and up
    step: int  # along the sum
    num_warps: int
    num_stages: int
    per_sm: int  # programs that fit a multiprocessor at once
    tma: bool = False  # operands that need no gathering come by the bulk copy engine
    flatten: bool = False  # one loop over all tiles of a program: the next one's loads overlap this one's store
    specialize: bool = False  # one warpgroup loads, two multiply 64 rows each
    precision: str = "tf32"  # of fp32 operands; without effect in 16 bits


# (kernel, where, rows of a tile) -> configuration. Where: "hopper" and "blackwell" before "tma", which is both; "any"
# from capability 8.0 on; "odd" rows, which TMA and 16-byte loads do not take; "fp32". "wgrad" has a tile of the weight
# and a step along the rows; its third key is that of the other kernels in the same pass.
_TABLE: dict[tuple[str, str, int], Config] = {
    # Both operands by TMA: two warpgroups with 168 registers a thread multiply, a third only loads. 192 KiB in flight.
    ("product", "hopper", 128): Config(128, 256, 64, 4, 4, 1, tma=True, specialize=True),
    # Accumulators in tensor memory; three stages, for the store of the flattened loop takes shared memory too.
    ("product", "blackwell", 128): Config(128, 256, 64, 8, 3, 1, tma=True, flatten=True),
    # Two warpgroups share the columns, 96 registers, 116 where outputs come last.
    ("product", "tma", 64): Config(64, 256, 64, 8, 4, 1, tma=True, flatten=True),
    ("product", "tma", 16): Config(16, 128, 128, 4, 3, 3, tma=True),
    # Two or three buffers of 32 KiB fit even the 99 KiB of consumer cards.
    ("product", "any", 128): Config(128, 128, 64, 8, 3, 1),
    ("product", "any", 64): Config(64, 128, 64, 4, 3, 2),
    ("product", "any", 16): Config(16, 128, 64, 4, 3, 2),
    # Rows that are no whole 16 bytes are loaded element by element, each with its own address: small tiles.
    ("product", "odd", 128): Config(128, 64, 32, 8, 2, 1),
    ("product", "odd", 64): Config(64, 64, 32, 8, 2, 1),
    ("product", "odd", 16): Config(16, 64, 32, 4, 2, 2),
    ("product", "fp32", 64): Config(64, 64, 32, 8, 2, 2, precision="ieee"),
    ("product", "fp32", 16): Config(16, 64, 32, 4, 2, 2, precision="ieee"),
    # x is gathered by cp.async, which the specialised loop does not take; gate and up are 128 x 256 together, and
    # flattening their store into the loop would spill.
    ("swiglu", "tma", 128): Config(128, 128, 64, 8, 4, 1, tma=True),
    ("swiglu", "tma", 64): Config(64, 128, 64, 8, 3, 1, tma=True),
    ("swiglu", "tma", 16): Config(16, 64, 128, 4, 3, 3, tma=True),
    ("swiglu", "any", 128): Config(128, 64, 64, 8, 3, 2),
    ("swiglu", "any", 64): Config(64, 64, 64, 4, 3, 2),
    ("swiglu", "any", 16): Config(16, 64, 64, 4, 3, 2),
    ("swiglu", "odd", 128): Config(128, 32, 32, 8, 2, 1),
    ("swiglu", "odd", 64): Config(64, 32, 32, 8, 2, 1),
    ("swiglu", "odd", 16): Config(16, 32, 32, 4, 2, 2),
    ("swiglu", "fp32", 64): Config(64, 32, 32, 8, 2, 2, precision="ieee"),
    ("swiglu", "fp32", 16): Config(16, 32, 32, 4, 2, 2, precision="ieee"),
    # The epilogue holds q, gate, up and what becomes of them beside each other, of half the columns at a time: 256
    # columns spill even so, and so do 128 at once.
    ("swiglu_backward", "tma", 128): Config(128, 128, 64, 8, 4, 1, tma=True),
    ("swiglu_backward", "tma", 64): Config(64, 128, 64, 8, 4, 1, tma=True),
    ("swiglu_backward", "tma", 16): Config(16, 128, 128, 4, 3, 3, tma=True),
    ("swiglu_backward", "any", 128): Config(128, 128, 64, 8, 3, 1),
    ("swiglu_backward", "any", 64): Config(64, 64, 64, 8, 3, 2),
    ("swiglu_backward", "any", 16): Config(16, 64, 64, 4, 3, 2),
    ("swiglu_backward", "odd", 128): Config(128, 32, 32, 8, 2, 1),
    ("swiglu_backward", "odd", 64): Config(64, 64, 32, 8, 2, 1),
    ("swiglu_backward", "odd", 16): Config(16, 64, 32, 4, 2, 2),
    ("swiglu_backward", "fp32", 64): Config(64, 64, 32, 4, 2, 2, precision="ieee"),
    ("swiglu_backward", "fp32", 16): Config(16, 64, 32, 4, 2, 2, precision="ieee"),
    ("wgrad", "hopper", 128): Config(128, 256, 64, 8, 4, 1, tma=True),
    ("wgrad", "blackwell", 128): Config(128, 128, 64, 8, 4, 1, tma=True),  # 256 columns of fp32 spill in the store
    # Few steps, so that writing dw is the work: half the tile, and two programs to write in turn.
    ("wgrad", "tma", 64): Config(128, 128, 64, 8, 3, 2, tma=True),
    ("wgrad", "tma", 16): Config(128, 128, 16, 8, 3, 2, tma=True),
    ("wgrad", "any", 128): Config(128, 128, 32, 8, 4, 1),
    ("wgrad", "any", 64): Config(128, 128, 32, 8, 4, 1),
    ("wgrad", "any", 16): Config(128, 128, 16, 8, 4, 1),
    ("wgrad", "odd", 128): Config(64, 64, 32, 8, 2, 2),
    ("wgrad", "odd", 64): Config(64, 64, 32, 8, 2, 2),
    ("wgrad", "odd", 16): Config(64, 64, 16, 8, 2, 2),
    ("wgrad", "fp32", 64): Config(64, 64, 32, 4, 2, 2, precision="ieee"),
    ("wgrad", "fp32", 16): Config(64, 64, 32, 4, 2, 2, precision="ieee"),
    # Gathered rows are found through their index, two loads deep: seven stages make four buffers, here of 48 KiB.
    ("wgrad_gathered", "hopper", 128): Config(128, 256, 64, 8, 7, 1, tma=True),
    ("wgrad_gathered", "blackwell", 128): Config(128, 128, 64, 8, 7, 1, tma=True),
    ("wgrad_gathered", "tma", 64): Config(128, 128, 64, 8, 5, 2, tma=True),
    ("wgrad_gathered", "tma", 16): Config(128, 128, 16, 8, 5, 2, tma=True),
    ("wgrad_gathered", "any", 128): Config(128, 128, 32, 8, 7, 1),
    ("wgrad_gathered", "any", 64): Config(128, 128, 32, 8, 7, 1),
    ("wgrad_gathered", "any", 16): Config(128, 128, 16, 8, 7, 1),
    ("wgrad_gathered", "odd", 128): Config(64, 64, 32, 8, 3, 2),
    ("wgrad_gathered", "odd", 64): Config(64, 64, 32, 8, 3, 2),
    ("wgrad_gathered", "odd", 16): Config(64, 64, 16, 8, 3, 2),
    ("wgrad_gathered", "fp32", 64): Config(64, 64, 32, 4, 3, 2, precision="ieee"),
    ("wgrad_gathered", "fp32", 16): Config(64, 64, 32, 4, 3, 2, precision="ieee"),
}


FP8_CAPABILITY = (8, 9)  # the least whose tensor cores take E4M3


def row_block(dtype: torch.dtype, n_rows: int, n_experts: int) -> int:
    """Rows of a tile, by the mean number of rows per expert; the loads themselves are on the device."""
    per_expert = n_rows / n_experts
    if per_expert <= 32:
        return 16
    return 64 if per_expert < 256 or _by_fma(dtype) else 128


def families(dtype: torch.dtype) -> list[tuple[int, bool]]:
    """(rows of a tile, whether rows are of whole 16 bytes): every pair that has tiles of its own."""
    return [(16, True), (64, True)] if _by_fma(dtype) else list(product((16, 64, 128), (True, False)))


def _by_fma(dtype: torch.dtype) -> bool:
    """Whether products are without tensor cores. The interpreter takes the 16-bit tiles for fp32 too: it is quicker in
    few large ones, and they are what is to be tested."""
    return dtype == torch.float32 and not INTERPRETED


def config_for(kernel: str, dtype: torch.dtype, device: torch.device, block: int, aligned: bool) -> Config:
    """The configuration of a kernel for tiles of `block` rows; aligned: all operands have rows of whole 16 bytes."""
    if _by_fma(dtype):
        places = ["fp32"]
    elif aligned:
        places = [*_TMA_PLACES.get(capability_of(device)[0], []), "any"]
    else:
        places = ["odd"]
    return next(_TABLE[kernel, place, block] for place in places if (kernel, place, block) in _TABLE)


_TMA_PLACES = {9: ["hopper", "tma"], 10: ["blackwell", "tma"]}  # by the major number of the compute capability


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; Triton's interpreter on a CPU passes for an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def obstacle_to_fp8(device: torch.device) -> str | None:
    """Why products in 8 bits cannot run there, to end a sentence with; None when they can."""
    found = capability_of(device)
    if found >= FP8_CAPABILITY:
        return None
    needed, there = (".".join(map(str, pair)) for pair in (FP8_CAPABILITY, found))
    return f"needs compute capability {needed} or newer, and {device} has {there}"


_FEW = 3  # multiprocessors: some programs with several tiles, and not all with as many
_few_programs: ContextVar[bool] = ContextVar("few_programs", default=False)


def n_programs(config: Config, device: torch.device, work: int) -> int:
    """As many programs as run at once, or fewer when there is less work."""
    multiprocessors = _FEW  # of the interpreter
    if device.type == "cuda" and not _few_programs.get():
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(multiprocessors * config.per_sm, work)


@contextmanager
def few_programs() -> Iterator[None]:
    """Within it, in this thread, a small problem keeps each program busy with several tiles, as a large one does."""
    token = _few_programs.set(True)
    try:
        yield
    finally:
        _few_programs.reset(token)
