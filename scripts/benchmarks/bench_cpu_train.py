"""A full training step on a CPU: ours against transformers' DeepSeek-V3, and against our own dense twin.

Losses of the same weights must agree before anything is timed, and all sides take some steps. They then train in turn,
each in a process of its own, every round on a fresh batch that all of them share, two steps of which the second is
timed; numbers are medians over the rounds, on two threads. Cases:

    fp32      both sides fp32, with the same head and loss, each with its trainer's memory: ours keeps what is freed.
              fp32-alike: transformers keeps it too; fp32-shipped: transformers with its own head and loss
    fastest   each side in the precision that is fastest for it; likewise fastest-alike and fastest-shipped
    dense     tokens per second of the mixture over those of its dense twin, and beside it the time of a twin's
              feed-forward over that of a routed layer with its shared expert, forward and backward
    meter     share of the wall time that metering a training loop takes

The floor is the step's operations at the rate of its own matrix products, measured in the same process.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from contestant import Contestant
from measure import Times, hardware, race
from step_parts import parts_ms, product_rate
from training_sides import Ours, batch_of, build_feed_forward, build_ours, build_theirs

from moe import ModelConfig, accounting
from moe.energy import EnergyMeter
from moe.model import Transformer

CONFIG = ModelConfig(
    vocab_size=8192, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=896,
    kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=64, n_shared_experts=1,
    num_experts_per_tok=6, moe_intermediate_size=128, first_k_dense_replace=1,
)  # fmt: skip
CASES = ("fp32", "fastest", "dense", "meter")
PEERS = {"theirs": "", "alike": "-alike", "shipped": "-shipped"}  # transformers' sides, and what their cases are called
BATCH, LENGTH, THREADS = 8, 256, 2
AGREE = {"fp32": 1e-5, "bf16": 1e-3, "pure bf16": 3e-3}  # largest relative difference of the first losses
METER_GOAL = 0.001
WARM_UP = 16  # steps: the first ones of a training map memory and, in bf16, compile products

Sides = Mapping[str, Contestant]
Lines = list[dict[str, object]]


class Bench:
    """The sides some cases need, their times, and the lines made of them."""

    def __init__(self, config: ModelConfig, batch: int, length: int, rounds: int, cases: Sequence[str]) -> None:
        self.config, self.shape, self.rounds, self.cases = config, (batch, length), rounds, cases
        self.tokens = batch * length
        self.experts_ms: dict[str, float] = {}  # a step by transformers' ways to compute experts
        self.rates: dict[str, float] = {}
        self.times: Times = {}  # milliseconds

    def lines(self) -> Lines:
        """Agree, time, then everything that is printed."""
        with ExitStack() as stack:
            sides = self._sides(stack)
            check({name: side(0) for name, side in sides.items()})  # each side's first step
            warm_up({name: side for name, side in sides.items() if "pure" not in name})  # it is several times too slow
            self.times = self._race(sides)
        if "dense" in self.cases:
            with ExitStack() as stack:
                layers = self._feed_forwards(stack)
                warm_up(layers)
                self.times |= self._race(layers)
        for name in ("fp32", "bf16"):
            dtype = torch.float32 if name == "fp32" else torch.bfloat16
            self.rates[name] = product_rate(self.config, self.tokens, dtype)
        found: Lines = []
        if "fp32" in self.cases:
            found += [self._against(f"fp32{suffix}", "ours fp32", f"{peer} fp32") for peer, suffix in PEERS.items()]
        if "fastest" in self.cases:
            mine = self._fastest("ours")
            found += [self._against(f"fastest{suffix}", mine, self._fastest(peer)) for peer, suffix in PEERS.items()]
        if "dense" in self.cases:
            found += [self._against_dense(precision) for precision in ("fp32", "bf16")]
        return found

    def _sides(self, stack: ExitStack) -> Sides:
        """Those the cases ask for."""

        def start(build: Any, config: ModelConfig, *setup: object) -> Contestant:
            return stack.enter_context(Contestant(THREADS, build, config, self.shape, *setup))

        sides = {f"ours {p}": start(build_ours, self.config, p) for p in ("fp32", "bf16")}
        cases = self.cases
        precisions = ("fp32", "bf16", "pure bf16") if "fastest" in cases else ("fp32",) if "fp32" in cases else ()
        if precisions:  # the batched way needs a weight for every token
            ways = {way: start(build_theirs, self.config, "fp32", way, True, False) for way in ("grouped_mm", "eager")}
            self.experts_ms = {way: round(min(taken), 1) for way, taken in self._race(ways).items()}
            experts = min(self.experts_ms, key=self.experts_ms.__getitem__)
            for name, *same in (("theirs", True, False), ("alike", True, True), ("shipped", False, False)):
                sides |= {f"{name} {p}": start(build_theirs, self.config, p, experts, *same) for p in precisions}
        if "dense" in cases:
            twin = self.config.dense_twin(match="active")
            sides |= {f"dense {p}": start(build_ours, twin, p) for p in ("fp32", "bf16")}
        return sides

    def _feed_forwards(self, stack: ExitStack) -> Sides:
        """A routed layer and the twin's, by themselves."""
        kinds = {"routed layer": self.config, "dense layer": self.config.dense_twin(match="active")}
        return {
            f"{name} {p}": stack.enter_context(Contestant(THREADS, build_feed_forward, config, self.shape, p))
            for name, config in kinds.items()
            for p in ("fp32", "bf16")
        }

    def _race(self, sides: Sides) -> Times:
        """Milliseconds of each side's step, everyone on the batch of the round."""
        seeds = itertools.count(1)
        seed = [0]
        work = {name: lambda side=side: side(seed[0]) for name, side in sides.items()}
        return race(work, "cpu", self.rounds, fresh=lambda: seed.__setitem__(0, next(seeds)), lead=1)

    def _median_s(self, name: str) -> float:
        return statistics.median(self.times[name]) / 1e3

    def _fastest(self, side: str) -> str:
        return min((name for name in self.times if name.startswith(side)), key=self._median_s)

    def _floor_s(self, precision: str) -> float:
        rate = self.rates["fp32" if precision == "fp32" else "bf16"]
        return accounting.flops_per_token(self.config, self.shape[1]) * self.tokens / rate

    def _against(self, case: str, mine: str, other: str) -> dict[str, object]:
        ours, peer = self._median_s(mine), self._median_s(other)
        precision, peer_precision = _precision(mine), _precision(other)
        side = Ours(self.config, precision)
        assert isinstance(side.model, Transformer)
        parts = parts_ms(side.model, side.optimizer, batch_of(self.config, self.shape, 1), precision == "bf16")
        import transformers

        more = {
            "ours_precision": precision, "peer_precision": peer_precision, "attention": "sdpa",
            "peer_head": "its own" if other.startswith("shipped") else "ours", "compile": False,
            "malloc": "keeps", "peer_malloc": "keeps" if other.startswith("alike") else "as it is",
            "peer_experts_ms": self.experts_ms,
            "all_ms": {name: round(1e3 * self._median_s(name), 1) for name in self.times},
            "spread_ms": {name: [round(f(self.times[name]), 1) for f in (min, max)] for name in (mine, other)},
            "parts_ms": parts, "transformers": transformers.__version__,
        }  # fmt: skip
        experts = min(self.experts_ms, key=self.experts_ms.__getitem__)
        peer_name = f"transformers DeepseekV3ForCausalLM, {peer_precision}, {experts} experts, sdpa"
        floor = self._floor_s(precision) / ours
        return self._line(case, ours * 1e3, peer * 1e3, peer_name, "ms per step", peer / ours, floor, more)

    def _against_dense(self, precision: str) -> dict[str, object]:
        ours, peer = (self.tokens / self._median_s(f"{name} {precision}") for name in ("ours", "dense"))
        floor = self._floor_s(precision) / self._median_s(f"ours {precision}")
        twin = self.config.dense_twin(match="active")
        routed_s, dense_s = (self._median_s(f"{kind} layer {precision}") for kind in ("routed", "dense"))
        more = {"precision": precision, "twin_intermediate_size": twin.intermediate_size,
                "twin_residual": accounting.twin_residual(self.config, twin),
                "routed_layer_ms": routed_s * 1e3, "dense_layer_ms": dense_s * 1e3,
                "routed_layer_ratio": dense_s / routed_s}  # fmt: skip
        peer_name = "our dense twin of equal active parameters"
        return self._line(f"dense/{precision}", ours, peer, peer_name, "tokens per s", ours / peer, floor, more)

    def meter(self) -> dict[str, object]:
        """A metered loop of real steps, called as `moe.trainer.loop` calls: three phases, progress, and a snapshot."""
        side = Ours(self.config, "fp32")
        gc.collect()  # the race's garbage: whichever thread allocates next would clear it away, the reader's too
        with tempfile.TemporaryDirectory() as folder, EnergyMeter(Path(folder) / "ledger.jsonl") as meter:
            told_s = wall_s = read_s = 0.0
            for number in range(-2, self.rounds):  # what the first calls load and allocate is paid once
                if number == 0:
                    told_s, wall_s, read_s = 0.0, time.perf_counter(), meter.reader_cpu_s
                for phase in ("data", "forward_backward", "optimizer"):
                    start = time.perf_counter()
                    meter.phase(phase)
                    told_s += time.perf_counter() - start
                    if phase == "forward_backward":
                        side.step(batch_of(self.config, self.shape, number + 3))
                start = time.perf_counter()
                meter.progress(number + 3, (number + 3) * self.tokens)
                meter.snapshot()
                told_s += time.perf_counter() - start
            wall_s = time.perf_counter() - wall_s
            share = (told_s + meter.reader_cpu_s - read_s) / wall_s
            source = "+".join(sorted({device.source for device in meter.devices}))
        return self._line(
            "meter", share, METER_GOAL, "the goal: a thousandth", "share of wall time", METER_GOAL / share, None,
            {"energy_source": source, "interval_s": 1.0, "wall_s": wall_s, "calls_s": told_s},
        )  # fmt: skip

    def _line(
        self, case: str, ours: float, peer: float, peer_name: str, unit: str, ratio: float, floor: float | None,
        more: dict[str, Any],
    ) -> dict[str, object]:  # fmt: skip
        batch, length = self.shape
        config = {
            **self.config.to_dict(), "batch": batch, "seq_len": length, "threads": torch.get_num_threads(),
            "rounds": self.rounds, "optimizer": "fused AdamW", "floor_gflops": {
                name: round(rate / 1e9, 1) for name, rate in self.rates.items()
            }, "torch": torch.__version__, **more,
        }  # fmt: skip
        return {"bench": "cpu-train", "case": case, "ours": ours, "peer": peer, "peer_name": peer_name, "unit": unit,
                "ratio": ratio, "floor_fraction": floor, "hardware": hardware(), "config": config}  # fmt: skip


def warm_up(sides: Sides) -> None:
    """Some steps of each."""
    for side in sides.values():
        for seed in range(WARM_UP):
            side(seed)


def check(losses: Mapping[str, float]) -> None:
    """Raises SystemExit unless those of the same weights and the same batch agree."""
    for name, loss in losses.items():
        difference = abs(loss / losses["ours fp32"] - 1)
        if not name.startswith("dense") and not difference <= AGREE[_precision(name)]:
            raise SystemExit(f"bench cpu-train: losses of {name} and ours differ by {difference:.1e}; no timing")


def _precision(side: str) -> str:
    """Of a side by its name: "theirs pure bf16" -> "pure bf16"."""
    return side.partition(" ")[2]


def main(
    words: Sequence[str] | None = None, config: ModelConfig = CONFIG, batch: int = BATCH, length: int = LENGTH
) -> None:
    """Command line; the tests give it a smaller model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args(words)
    torch.set_num_threads(THREADS)
    bench = Bench(config, batch, length, options.rounds, options.case)
    if set(options.case) - {"meter"}:
        for line in bench.lines():
            print(json.dumps(line), flush=True)
    if "meter" in options.case:
        print(json.dumps(bench.meter()), flush=True)


if __name__ == "__main__":
    main()
