"""What a tool told of scripted GPUs, set against what they used.

    told = measure("ours", sys.executable, lambda epoch_ns: gpus("counter", 8, 0, epoch_ns), spans({10: 3}, 30, 0))
    print(share_covered(told), errors(told)[-1])

A window of one device is one outcome. Its error is a share of the truth; it is covered when the error is at most the
band the tool gave with its number; `widths` sets that band against what the meter promises for an energy counter.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from meter_scenarios import LIMIT_W, NS, TICK_S, FakeGpu, FakeNode, Plan, Span, compile_library

__all__ = ["Outcome", "ToolFailedError", "errors", "measure", "quantile", "share_covered", "widths"]

LEAD_S = {"ours": 2.0, "zeus": 12.0, "codecarbon": 20.0}  # what each takes to start, and more
PATIENCE_S = 60.0
CHILD = Path(__file__).with_name("meter_windows.py")
GAIN = 0.05


class ToolFailedError(Exception):
    """A tool did not come to its end; the last line it wrote."""


@dataclass(frozen=True)
class Outcome:
    """One window of one device, in joules and (rounded down) seconds."""

    uuid: str
    length_s: float
    truth_j: float
    energy_j: float
    band_j: float | None

    @property
    def error(self) -> float:
        return abs(self.energy_j - self.truth_j) / self.truth_j

    @property
    def covered(self) -> bool:
        return self.band_j is not None and abs(self.energy_j - self.truth_j) <= self.band_j

    @property
    def band(self) -> float:
        """As a share of the energy told."""
        return (self.band_j or 0.0) / self.energy_j

    @property
    def width(self) -> float:
        """Band over 5 % + 2 x 0.1 s x P_max / E; the promise for a counter is at most 1."""
        return self.band / (GAIN + 2 * TICK_S * LIMIT_W / self.energy_j)


def measure(tool: str, python: str, make: Callable[[int], list[FakeGpu]], spans: Sequence[Span]) -> list[Outcome]:
    """Run a tool in real time on the GPUs `make` returns for an epoch. Raises ToolFailedError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = FakeNode(compile_library(folder), folder)
        smi = folder / "nvidia-smi"  # by whose presence some programs tell that there is a driver
        smi.write_text("#!/bin/sh\n")
        smi.chmod(0o755)
        node.env["PATH"] = f"{folder}:{node.env['PATH']}"
        epoch_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + round(LEAD_S[tool] * NS)
        gpus = {gpu.uuid: gpu for gpu in make(epoch_ns)}
        node.fill(gpus.values())
        plan = Plan(list(gpus), epoch_ns, list(spans))
        seconds = LEAD_S[tool] + max(span.end_s for span in spans) + PATIENCE_S
        results = folder / "results"
        process = subprocess.run(
            [python, str(CHILD), tool, str(results)], input=json.dumps(plan.to_json()), env=node.env, text=True,
            capture_output=True, timeout=seconds,
        )  # fmt: skip
        if process.returncode != 0:
            raise ToolFailedError((process.stderr.strip() or "it said nothing").splitlines()[-1])
        lines = results.read_text().splitlines()
    lengths_s = {span.name: span.length_s for span in spans}
    outcomes = []
    for told in map(json.loads, lines):
        gpu = gpus[told["uuid"]]
        truth_j = (gpu.energy_mj(told["end_ns"]) - gpu.energy_mj(told["start_ns"])) / 1000
        outcomes.append(Outcome(gpu.uuid, lengths_s[told["span"]], truth_j, told["energy_j"], told["band_j"]))
    return outcomes


def errors(outcomes: Iterable[Outcome]) -> list[float]:
    """Shares of the truth, smallest first."""
    return sorted(outcome.error for outcome in outcomes)


def widths(outcomes: Iterable[Outcome]) -> list[float]:
    """Bands over what is promised, smallest first."""
    return sorted(outcome.width for outcome in outcomes)


def share_covered(outcomes: Sequence[Outcome]) -> float:
    """Share of the windows whose band holds the truth."""
    return sum(outcome.covered for outcome in outcomes) / len(outcomes)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]
