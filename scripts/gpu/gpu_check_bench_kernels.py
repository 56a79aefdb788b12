"""The kernels' benchmark, between two measurements of what the device can do at best."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_check_part import ROOT, Part, main

SIDE, COPY_BYTES = 8192, 4 * 2**30  # far more than any cache holds
DRY = ("--device", "cpu", "--case", "tiny-fp32", "--rounds", "1")


def run(part: Part) -> None:
    """Ceilings, the benchmark, ceilings again: their difference is the machine's own noise and warmth."""
    device = "cpu" if part.dry else "cuda"
    with part.section("ceilings"):
        part.put("ceilings_before", ceilings(device))
        before = part.data["ceilings_before"]
        part.say(f"{before['product_tflop_per_s']} TFLOP/s bf16 product, {before['copy_tb_per_s']} TB/s copy")
    with part.section("benchmark"):
        # a case that is begun takes up to half a minute, most of it the peers' tuning
        begin_until_s = max(10.0, part.seconds_left - 45)
        bench(part, DRY if part.dry else ("--seconds", f"{begin_until_s:.0f}"), "bench_kernels.log")
    with part.section("ceilings again"):
        part.put("ceilings_after", ceilings(device))
    for name, line in best_peers(part.data.get("lines", []), "experts/forward+backward").items():
        part.say(f"{name} {line['ours']} TFLOP/s, {line['ratio']} x {line['peer_name']}")


def bench(part: Part, words: tuple[str, ...], log: str) -> None:
    """Run `bench_kernels.py`; the lines it printed until it ended, or was killed, are a finding."""
    command = [sys.executable, "-B", str(ROOT / "scripts" / "benchmarks" / "bench_kernels.py"), *words]
    status = part.child(command, log, part.seconds_left - 10)
    text = (part.keep / log).read_text(errors="replace")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"bench"')]
    part.put("lines", lines)
    if status is None:
        part.note(f"time ran out after {len(lines)} lines")
    if status != 0 or not lines:
        raise RuntimeError(f"exit status {status}: {part.tail(log, 300)}")


def best_peers(lines: list[dict[str, Any]], phase: str) -> dict[str, dict[str, Any]]:
    """Shape and routing to the line of the peer that is hardest to beat."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        name, _, rest = line["case"].rpartition(f"/{phase}")
        if not rest and name and line["ratio"] < found.get(name, {"ratio": float("inf")})["ratio"]:
            found[name] = line
    return found


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
