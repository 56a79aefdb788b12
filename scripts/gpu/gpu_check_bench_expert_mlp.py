"""The expert MLP against its peers, between two measurements of what the device can do at best in the same process."""

import contextlib
import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from gpu_check_part import ROOT, Part, main

SHAPES = ("olmoe", "fine-grained", "qwen3-30b")  # the most telling first: the last may find no time
SIDE, COPY_BYTES = 8192, 4 * 2**30  # far more than any cache holds


def run(part: Part) -> None:
    """Ceilings, shapes, ceilings again: their difference is the machine's own noise and warmth."""
    device = "cpu" if part.dry else "cuda"
    with part.section("ceilings"):
        part.put("ceilings_before", ceilings(device))
        before = part.data["ceilings_before"]
        part.say(f"{before['product_tflop_per_s']} TFLOP/s bf16 product, {before['copy_tb_per_s']} TB/s copy")
    with part.section("benchmark file"):
        bench = load_bench()
        cases = {"dry": bench.Case(64, 32, 16, 4, 2, torch.float32)} if part.dry else bench.CASES["cuda"]
        lines: list[dict[str, Any]] = []
        for name in cases if part.dry else SHAPES:
            if part.seconds_left < 20 and not part.dry:
                part.note(f"{name} was left out: {part.seconds_left:.0f} s were left")
                continue
            with part.section(name):
                lines += one_case(bench, name, cases[name], device)
                part.put("lines", lines)
    with part.section("ceilings again"):
        part.put("ceilings_after", ceilings(device))
    for line in lines:
        if line["config"]["backend"] == "triton" and line["case"].endswith("backward"):
            part.say(f"{line['case'].split('/')[0]} {line['ratio']} x {line['peer_name']}")
    part.put("device_memory_peak_gib", 0 if part.dry else round(torch.cuda.max_memory_allocated() / 2**30, 2))


def load_bench() -> ModuleType:
    """kernels/benchmarks/bench_expert_mlp.py, which is a file and no module."""
    path = ROOT / "kernels" / "benchmarks" / "bench_expert_mlp.py"
    spec = importlib.util.spec_from_file_location("bench_expert_mlp_file", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_case(bench: ModuleType, name: str, case: Any, device: str) -> list[dict[str, Any]]:
    """The lines the benchmark prints for one shape."""
    backends = ["torch", "triton"] if device == "cuda" else ["torch"]
    printed, start = io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(printed):
            bench.bench(name, case, device, backends, 10 if device == "cuda" else 2)
    except SystemExit as error:  # the benchmark's word for a wrong result
        raise RuntimeError(str(error)) from None
    finally:
        print(printed.getvalue(), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    seconds = round(time.monotonic() - start, 1)
    return [{**json.loads(line), "case_seconds": seconds} for line in printed.getvalue().splitlines()]


def ceilings(device: str) -> dict[str, Any]:
    """A large bf16 product on random data, and a large copy counting bytes read and written: medians."""
    side, size = (SIDE, COPY_BYTES) if device == "cuda" else (256, 2**22)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    product_ms = timed(lambda: torch.matmul(a, b, out=c), device)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = timed(lambda: target.copy_(source), device)
    return {
        "product_side": side,
        "product_ms": [round(t, 4) for t in product_ms],
        "product_tflop_per_s": round(2 * side**3 / statistics.median(product_ms) / 1e9, 2),
        "copy_bytes": size,
        "copy_ms": [round(t, 4) for t in copy_ms],
        "copy_tb_per_s": round(2 * size / statistics.median(copy_ms) / 1e9, 3),
    }


def timed(work: Callable[[], object], device: str, repeats: int = 20) -> list[float]:
    """Milliseconds of each of some calls, after three that are not counted; by the device's own clock on a GPU."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


if __name__ == "__main__":
    main(run)
