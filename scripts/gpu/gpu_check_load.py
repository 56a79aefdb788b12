"""A load for the probe, in a process of its own so that reading sensors and starting matrix products never wait for
each other. Reads one command a line: `steady SECONDS`, `bursty SECONDS ON_MS OFF_MS`, `quit`; answers each with
`started NANOSECONDS` (monotonic clock) and, when it is over, one JSON line of what was computed.

The products are bf16 on random data: zeros draw less power.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch

SIDE = 8192


class Load:
    """Square matrix products, a few queued at a time so that the device never waits for the next one."""

    def __init__(self, device: str, side: int) -> None:
        self.device, self.side = device, side
        generator = torch.Generator(device).manual_seed(0)
        self.a, self.b = (
            torch.randn(side, side, device=device, generator=generator).to(torch.bfloat16) for _ in range(2)
        )
        self.c = torch.empty_like(self.a)
        self.products = 0

    def queue(self, count: int) -> Callable[[], None]:
        """Start some products; the returned function waits for them."""
        for _ in range(count):
            torch.matmul(self.a, self.b, out=self.c)
        self.products += count
        if self.device == "cpu":
            return lambda: None
        done = torch.cuda.Event()
        done.record()
        return done.synchronize

    def until(self, end_ns: int, batch: int) -> None:
        """Keep the device busy: while one batch runs the next one is queued."""
        wait = self.queue(batch)
        while time.monotonic_ns() < end_ns:
            following = self.queue(batch)
            wait()
            wait = following
        wait()

    def steady(self, seconds: float) -> None:
        self.until(time.monotonic_ns() + int(seconds * 1e9), batch=8)

    def bursty(self, seconds: float, on_ms: float, off_ms: float) -> None:
        end_ns = time.monotonic_ns() + int(seconds * 1e9)
        while time.monotonic_ns() < end_ns:
            self.until(time.monotonic_ns() + int(on_ms * 1e6), batch=1)
            time.sleep(off_ms / 1000)


def main() -> None:
    """Warm up, say ready with the device's identity, then obey."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=SIDE)
    options = parser.parse_args()
    load = Load(options.device, options.side)
    for _ in range(5):
        load.queue(4)()
    uuid = str(torch.cuda.get_device_properties(0).uuid) if options.device == "cuda" else None
    print(json.dumps({"ready": True, "torch_uuid": uuid}), flush=True)
    commands: dict[str, Callable[..., None]] = {"steady": load.steady, "bursty": load.bursty}
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "quit":
            return
        load.products, start_ns = 0, time.monotonic_ns()
        print(f"started {start_ns}", flush=True)
        commands[word](*map(float, numbers))
        elapsed_s = (time.monotonic_ns() - start_ns) / 1e9
        flops = load.products * 2 * load.side**3
        answer = {"command": line.strip(), "start_ns": start_ns, "elapsed_s": elapsed_s, "products": load.products}
        print(json.dumps({**answer, "tflop_per_s": flops / elapsed_s / 1e12}), flush=True)


if __name__ == "__main__":
    main()
