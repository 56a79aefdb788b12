"""What metering a training costs: reader thread and meter calls as a share of the wall time; steps with and without.

Each case is a process of its own with a made-up NVML driver, and trains the quickstart's model as the trainer does:

    1 GPU, 8 GPUs                  a driver that answers at once
    1 GPU, 20 ms; 8 GPUs, 20 ms    one that sleeps so long in each energy call
    8 GPUs, power alone, 20 ms     one without a counter, that sleeps so long in each power call
    trainer                        the quickstart recipe under `moe.trainer.train`, on what this host has

Steps with the meter and without take turns in blocks; the first of a pair changes from pair to pair. After each block
with the meter come a `window` and a checkpoint's `flush`, whose longest calls are told; so are those of starting and
stopping the meter, which once a run talk to the driver in the calling thread. None of these is in the share.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fake_driver import fake_driver, fake_uuids
from measure import hardware, print_line
from torch import nn

from moe import Balancer, Transformer
from moe.config import ModelConfig, parse_overrides
from moe.energy import EnergyMeter
from moe.energy.window import Window
from moe.optim import build_optimizer

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = {  # GPUs, seconds a call, whether there is a counter
    "1 GPU": (1, 0.0, True),
    "8 GPUs": (8, 0.0, True),
    "1 GPU, 20 ms": (1, 0.02, True),
    "8 GPUs, 20 ms": (8, 0.02, True),
    "8 GPUs, power alone, 20 ms": (8, 0.02, False),
}
CASES = (*DRIVERS, "trainer")
CALLS = ((EnergyMeter, ("phase", "progress", "snapshot", "flush")), (Window, ("__enter__", "__exit__")))
GOAL, THREADS = 0.001, 2
BATCH, LENGTH = 8, 256  # as in the recipe

sys.path.insert(0, str(ROOT / "recipes"))
from quickstart_moe import RECIPE  # noqa: E402


class Calls:
    """Time that the program spends inside the meter's calls."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.longest_s: dict[str, float] = {}
        for kind, names in CALLS:
            for name in names:
                setattr(kind, name, self._timed(getattr(kind, name), f"{kind.__name__}.{name}"))

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **words: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **words)
            spent_s = time.perf_counter() - start
            self.spent_s += spent_s
            self.longest_s[name] = max(spent_s, self.longest_s.get(name, 0.0))
            return result

        return timed


class Steps:
    """Optimizer steps of a model on random tokens."""

    def __init__(self, config: ModelConfig) -> None:
        torch.manual_seed(0)
        self.model = Transformer(config).train()
        self.optimizer = build_optimizer(self.model, RECIPE.optim)
        self.balancer = Balancer(self.model, method="sign")
        self.number = 0

    def step(self, meter: EnergyMeter | None) -> None:
        """One step, told to the meter as `moe.trainer.loop` tells it."""
        self._tell(meter, "data")
        ids = torch.randint(self.model.config.vocab_size, (BATCH, LENGTH))
        self._tell(meter, "forward_backward")
        self.model(ids, labels=ids).loss.backward()
        self._tell(meter, "optimizer")
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.step()
        self.number += 1
        if meter is not None:
            meter.progress(self.number, self.number * BATCH * LENGTH)
            meter.snapshot()

    def _tell(self, meter: EnergyMeter | None, phase: str) -> None:
        if meter is not None:
            meter.phase(phase)


class Bench:
    """One case: blocks with the meter and without in turn."""

    def __init__(self, config: ModelConfig, devices: list[str], folder: Path, block_s: float) -> None:
        self.steps, self.calls = Steps(config), Calls()
        self.devices, self.folder, self.block_s = devices, folder, block_s
        self.read_s = self.told_s = self.metered_s = 0.0
        self.edge_s: dict[str, list[float]] = {"start": [], "stop": []}
        self.sources: set[str] = set()

    def run(self, pairs: int) -> dict[str, Any]:
        """Shares, the paired ratio and how long the calls were."""
        for _ in range(3):
            self.steps.step(None)
        ratios, off_s = [], []
        for number in range(pairs):
            order = (self._metered, self._plain) if number % 2 else (self._plain, self._metered)
            times = {work: work() for work in order}
            ratios.append(times[self._metered] / times[self._plain])
            off_s.append(times[self._plain])
        low, high = interval(ratios)
        return {
            "share": (self.read_s + self.told_s) / self.metered_s,
            "reader_share": self.read_s / self.metered_s,
            "calls_share": self.told_s / self.metered_s,
            "on_over_off": statistics.median(ratios),
            "on_over_off_95": [low, high],
            "pairs": pairs,
            "step_s": statistics.median(off_s),
            "metered_s": self.metered_s,
            "longest_call_ms": {name: spent_s * 1e3 for name, spent_s in self.calls.longest_s.items()},
            "start_and_stop_ms": {name: statistics.median(taken) * 1e3 for name, taken in self.edge_s.items()},
            "source": "+".join(sorted(self.sources)),
        }

    def _plain(self) -> float:
        return self._block(lambda: self.steps.step(None))

    def _block(self, step: Callable[[], None]) -> float:
        """Seconds a step: the mean without the tenth at either end, where other programs held a step up."""
        begun, taken = time.perf_counter(), []
        while time.perf_counter() - begun < self.block_s or len(taken) < 10:
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        cut = len(taken) // 10
        return statistics.mean(sorted(taken)[cut : len(taken) - cut])

    def _metered(self) -> float:
        begun = time.perf_counter()
        meter = EnergyMeter(self.folder / f"{self.steps.number}.jsonl", self.devices).start()
        self.edge_s["start"].append(time.perf_counter() - begun)
        self.sources |= {device.source for device in meter.devices}
        self.steps.step(meter)  # what the first calls load and allocate is paid once a run
        told_s, read_s, start = self.calls.spent_s, meter.reader_cpu_s, time.perf_counter()
        step_s = self._block(lambda: self.steps.step(meter))
        self.told_s += self.calls.spent_s - told_s
        self.read_s += meter.reader_cpu_s - read_s
        self.metered_s += time.perf_counter() - start
        with meter.window("step"):
            self.steps.step(meter)
        meter.flush(self.steps.number)
        begun = time.perf_counter()
        meter.stop()
        self.edge_s["stop"].append(time.perf_counter() - begun)
        return step_s


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of medians of values drawn again and again from these (bootstrap)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def trainer(folder: Path, steps: int, words: Sequence[str]) -> dict[str, Any]:
    """The quickstart recipe, from the meter's start to its stop: evaluations and checkpoints inside."""
    from moe.trainer import train

    calls = Calls()
    found: dict[str, Any] = {}
    begin, end = EnergyMeter.start, EnergyMeter.stop

    def start(meter: EnergyMeter) -> EnergyMeter:
        begin(meter)
        found["start"] = time.perf_counter()
        return meter

    def stop(meter: EnergyMeter, reason: str = "stopped") -> None:
        if "share" not in found:  # a second stop does nothing
            metered_s, read_s = time.perf_counter() - found.pop("start"), meter.reader_cpu_s
            found["share"] = (read_s + calls.spent_s) / metered_s
            found["reader_share"], found["calls_share"] = read_s / metered_s, calls.spent_s / metered_s
            found["step_s"], found["metered_s"] = metered_s / steps, metered_s
            found["source"] = meter.snapshot().source
        end(meter, reason)

    EnergyMeter.start, EnergyMeter.stop = start, stop  # type: ignore[method-assign]
    every = max(1, steps // 4)
    train(parse_overrides(RECIPE, [
        "run.name=overhead", f"run.directory={folder}", f"train.max_steps={steps}", "optim.warmup_steps=1",
        f"train.checkpoint_every_steps={every}", *words,
    ]))  # fmt: skip
    found["longest_call_ms"] = {name: spent_s * 1e3 for name, spent_s in calls.longest_s.items()}
    return found


def case(name: str, pairs: int, block_s: float, steps: int, words: Sequence[str]) -> None:
    """One case, in this process; prints its line. `words` change the recipe."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        if name == "trainer":
            found = trainer(Path(folder), steps, words)
        else:
            model = parse_overrides(RECIPE, list(words)).model
            found = Bench(model, fake_uuids(DRIVERS[name][0]), Path(folder), block_s).run(pairs)
    print_line(
        "meter-overhead", name, ours=found["share"], peer=GOAL, peer_name="the goal: a thousandth",
        unit="share of wall time", ratio=GOAL / found["share"], floor_fraction=None, hardware=hardware(), config=found,
    )  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Command line: every case in a process of its own, which its driver is loaded into."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--pairs", type=int, default=10, help="of blocks with the meter and without")
    parser.add_argument("--block", type=float, default=6.0, metavar="SECONDS", help="length of a block")
    parser.add_argument("--steps", type=int, default=200, help="of the case trainer")
    parser.add_argument("--recipe", nargs="*", default=[], metavar="section.field=value", help="changes to the recipe")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process of one case
    options = parser.parse_args(words)
    if options.here:
        case(options.case[0], options.pairs, options.block, options.steps, options.recipe)
        return
    passed = [f"--pairs={options.pairs}", f"--block={options.block}", f"--steps={options.steps}"]
    passed += ["--recipe", *options.recipe]
    for name in options.case:
        with tempfile.TemporaryDirectory() as folder:
            driver = fake_driver(Path(folder), *DRIVERS[name]) if name in DRIVERS else {}
            subprocess.run(
                [sys.executable, __file__, "--here", "--case", name, *passed], env={**os.environ, **driver}, check=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip


if __name__ == "__main__":
    main()
