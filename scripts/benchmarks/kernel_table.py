"""Write docs/results/kernels-compiled.md: what the compiler made of every kernel, and what that predicts for an H200.

    scripts/kernel_table [--out FILE] [--work NAME …]

Nothing is measured. Every launch of the goal shapes is recorded, forward and backward with the router before the
experts, and its time is counted from operations and bytes, so that the first measurement tests the prediction.
"""

import argparse
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from kernel_cases import GPU
from kernel_compile import Compiled, compile_launch, identity
from kernel_launches import Glue, Launch, described, record
from kernel_work import WORK, architectures

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "kernels-compiled.md"

PRODUCT_RATE, BANDWIDTH = 780e12, 4.3e12  # an H200's bf16 product of 8192^3, and its copy
PRODUCT_SHARE, BANDWIDTH_SHARE = 0.65, 0.85  # what Triton kernels of these kinds reach of either on Hopper
LAUNCH_S = 3e-6  # between two kernels of one stream

HEAD = """# What the kernels compile to, and what that predicts

**Nothing on this page was measured.** It is what Triton's compiler says of every kernel, for GPUs that were not there,
and a prediction for one H200 that a measurement has yet to test.

- Hardware: none; compiled on {machine}
- Software: Python {python}, torch {torch}, triton {triton}
- Command: `scripts/kernel_table`
- Commit: {commit}; date: {date}

## Compiled

Each launch of the calls in `scripts/benchmarks/kernel_work.py`, as its launcher launches it; equal ones once. Occupancy
is resident warps over 64, by registers, shared memory and warps of a block; a specialised kernel gives its registers to
partitions unevenly, which this does not see. Stack above 0 is spilled registers.

| kernel | configuration | arch | registers | stack, B | shared, KiB | warps | occupancy | matrix unit | partitions |
|---|---|---|---:|---:|---:|---:|---:|---|---:|
"""

PREDICTED = """
## Predicted for one H200

A kernel takes the longer of its operations over {product_share:.0%} of {product:.0f} TFLOP/s and its bytes over
{bandwidth_share:.0%} of {bandwidth:.1f} TB/s, plus {launch:.0f} us for the launch. Both rates are those of large plain
kernels on an H200; the shares are assumed, from what is published of Triton's products on Hopper. A product has
2 R I O operations for R rows and a weight of (E, O, I); what pads an expert's last tile is not counted. Bytes are those
of every tensor once, so gathered rows are taken to come from memory once and from the L2 cache after that. Integer work
of routing and sorting, atomics, uneven loads and the tail of the last wave are not counted either: what only moves
bytes may well take longer than said here. Steps called torch are its own kernels between ours.

The floor is 6 T K D F operations forward and 18 forward and backward at the full {product:.0f} TFLOP/s.
"""


class Step(NamedTuple):
    """A launch or a piece of glue: its name, operations, bytes and predicted seconds."""

    name: str
    flops: int
    bytes_moved: int
    seconds: float


def predict(step: Launch | Glue, rows: int, unit: str) -> Step:
    """Seconds on an H200, as the page says; `unit` is what multiplies matrices in the compiled kernel, if anything."""
    flops = product_flops(step, rows) if isinstance(step, Launch) and unit else 0
    compute_s, memory_s = flops / (PRODUCT_SHARE * PRODUCT_RATE), step.bytes_moved / (BANDWIDTH_SHARE * BANDWIDTH)
    name = step.name if isinstance(step, Launch) else f"torch {step.name}"
    return Step(name, flops, step.bytes_moved, max(compute_s, memory_s) + LAUNCH_S)


def product_flops(launch: Launch, rows: int) -> int:
    """Of a grouped product: every one has one weight, or gradient of a weight, (E, O, I). Raises if there is none."""
    weights = [t for t in launch.tensors.values() if t.dim() == 3]
    if not weights:
        raise ValueError(f"{launch.name} multiplies matrices and has no tensor (E, O, I): say how to count it")
    return max(2 * rows * w.shape[1] * w.shape[2] for w in weights)


def main(words: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--work", nargs="*", choices=WORK, default=list(WORK), metavar="NAME", help=", ".join(WORK))
    options = parser.parse_args(words)
    kernels: dict[str, tuple[str, Compiled]] = {}  # by identity: the line's first cells, and what came of it
    units: dict[str, str] = {}
    for name in options.work:
        for arch in architectures(name):
            for launch in launches(name, arch):
                key = identity(launch, arch)
                if key not in kernels:
                    cells = f"| {launch.name} | {described(launch)} | sm_{arch} "
                    kernels[key] = cells, compile_launch(launch, arch)
                    units[launch.name] = units.get(launch.name) or kernels[key][1].unit
    page = HEAD.format(
        machine=platform.machine(), python=platform.python_version(), torch=torch.__version__,
        triton=triton.__version__, commit=commit(), date=datetime.now(UTC).date(),
    )  # fmt: skip
    page += "\n".join(sorted({line(*found) for found in kernels.values()})) + "\n"
    page += PREDICTED.format(
        product_share=PRODUCT_SHARE, product=PRODUCT_RATE / 1e12, bandwidth_share=BANDWIDTH_SHARE,
        bandwidth=BANDWIDTH / 1e12, launch=LAUNCH_S * 1e6,
    )  # fmt: skip
    page += "".join(prediction(name, units) for name in options.work if name in GPU)
    options.out.write_text(page, encoding="utf-8")
    print(f"{len(kernels)} compiled kernels, {options.out}")


def launches(name: str, arch: int) -> list[Launch]:
    return [step for step in record(WORK[name], arch) if isinstance(step, Launch)]


def line(cells: str, c: Compiled) -> str:
    """A row of the first table."""
    return (
        f"{cells}| {c.registers} | {c.stack} | {c.shared / 1024:.1f} | {c.warps} | {c.occupancy:.2f} "
        f"| {c.unit or '-'} | {c.partitions or '-'} |"
    )


def prediction(name: str, units: dict[str, str]) -> str:
    """The section of a shape: each step, forward alone and the whole."""
    case = GPU[name]
    forward = [predict(step, case.rows, units.get(step.name, "")) for step in record(WORK[f"{name}/inference"], 90)]
    whole = [predict(step, case.rows, units.get(step.name, "")) for step in record(WORK[name], 90)]
    rows = [f"| {s.name} | {s.flops / 1e9:.0f} | {s.bytes_moved / 1e6:.1f} | {s.seconds * 1e6:.0f} |" for s in whole]
    title = f"\n### {name}: T={case.tokens} D={case.model} F={case.hidden} E={case.experts} K={case.top_k}, "
    title += f"{'fp32 weights under autocast' if case.masters else 'bf16 weights'}\n\n"
    heading = "| step, in order | GFLOP | MB | us |\n|---|---:|---:|---:|\n"
    totals = total("Forward", forward, case.forward_flops) + total(
        "Forward and backward", whole, 3 * case.forward_flops
    )
    return title + totals + "\n" + heading + "\n".join(rows) + "\n"


def total(phase: str, steps: Iterable[Step], flops: int) -> str:
    """One sentence: time, rate, share of the floor, and what is not products."""
    steps = list(steps)
    seconds, floor_s = sum(s.seconds for s in steps), flops / PRODUCT_RATE
    rest_s = sum(s.seconds for s in steps if not s.flops)
    return (
        f"{phase}: {seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.0f} TFLOP/s, {floor_s / seconds:.2f} of the floor "
        f"({floor_s * 1e3:.2f} ms); {rest_s * 1e3:.2f} ms of it are not products.\n"
    )


def commit() -> str:
    """Of this repository, with + when files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
