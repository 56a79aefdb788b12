"""A routed MoE layer on a CPU, forward and backward: against a dense MLP of the same operations, and transformers.

    scripts/bench cpu-layer [--case NAME …] [--rounds N]

The layer is router and experts, softmax scores, no shared expert; every round has a fresh batch, so loads differ from
round to round as in training. Peers: a dense SwiGLU as wide as the K experts of a token, without routing; and
transformers' Qwen3-MoE block with the same weights, by the fastest of its implementations and precisions. Outputs of
the same weights must agree before anything is timed. Everyone runs in turn, in a process of their own, on two threads;
ratios are medians of those of each round. All keep the memory they free, as our trainer does. The floor is one matrix
product of the same operations, timed in the same rounds.

bf16 is autocast over fp32 weights on all sides; transformers may also hold its weights in bf16.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from contestant import Contestant
from measure import hardware, paired_ratio, print_line, race
from step_parts import train_layer
from torch import Tensor, nn

from moe.layers import FeedForward, MoE
from moe.trainer.host_memory import keep_freed

THREADS = 2
AGREE = {"fp32": 1e-5, "bf16": 2e-2}  # norm of the difference over the norm
IMPLEMENTATIONS = ("grouped_mm", "eager")  # the batched one copies a weight for every row


class Case(NamedTuple):
    """T tokens, D model, F hidden, E experts, K top-k."""

    precision: str
    tokens: int
    model: int
    hidden: int
    experts: int
    top_k: int

    @property
    def flops(self) -> int:
        """Of the experts' products, forward and backward."""
        return 18 * self.tokens * self.top_k * self.model * self.hidden


CASES = {
    "fp32/16": Case("fp32", 2048, 256, 128, 16, 6),
    "fp32/64": Case("fp32", 2048, 256, 128, 64, 6),
    "bf16/16": Case("bf16", 2048, 256, 128, 16, 6),
    "bf16/64": Case("bf16", 4096, 512, 256, 64, 6),  # 384 tokens an expert
    "small-bf16/64": Case("bf16", 2048, 256, 128, 64, 6),  # 192 tokens an expert
}


class Block(nn.Module):
    """transformers' block on (T, D), with the weights of `ours`."""

    def __init__(self, ours: MoE, case: Case, implementation: str, dtype: torch.dtype) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=case.model, moe_intermediate_size=case.hidden, num_experts=case.experts,
            num_experts_per_tok=case.top_k, norm_topk_prob=True,
        )  # fmt: skip
        config._experts_implementation = implementation
        self.block = Qwen3MoeSparseMoeBlock(config)
        with torch.no_grad():
            self.block.gate.weight.copy_(ours.router.weight)
            self.block.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
            self.block.experts.down_proj.copy_(ours.experts.down_proj)
        self.block.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.to(self.dtype)[None])[0]


def ours(case: Case) -> MoE:
    """The layer, the same weights every time."""
    torch.manual_seed(0)
    return MoE(case.model, case.experts, case.top_k, case.hidden, score_func="softmax", topk_method="greedy")


def theirs(case: Case) -> dict[str, tuple[str, torch.dtype]]:
    """transformers' ways to compute it: implementation and dtype of the weights."""
    words = {"": torch.float32} | ({" in bf16": torch.bfloat16} if case.precision == "bf16" else {})
    return {f"transformers {how}{word}": (how, dtype) for how in IMPLEMENTATIONS for word, dtype in words.items()}


def build(case: Case, name: str) -> Callable[[int | None], None]:
    """Of one who takes part: called with a seed, a fresh batch; without, the work on it."""
    keep_freed()
    bf16 = case.precision == "bf16"
    x = torch.empty(case.tokens, case.model)
    if name == "floor":
        dtype = torch.bfloat16 if bf16 else torch.float32
        wide, rows = torch.randn(case.model, 9 * case.top_k * case.hidden).to(dtype), torch.randn_like(x).to(dtype)
        work: Callable[[], object] = lambda: rows @ wide  # noqa: E731
    elif name == "dense MLP":
        work = train_layer(FeedForward(case.model, case.top_k * case.hidden), x, bf16)
    elif name == "ours":
        work = train_layer(ours(case), x, bf16)
    else:
        block = Block(ours(case), case, *theirs(case)[name])
        work = train_layer(block, x, bf16 and block.dtype == torch.float32)

    def turn(seed: int | None) -> None:
        if seed is None:
            work()
        else:
            x.normal_(generator=torch.Generator().manual_seed(seed))

    return turn


def run(name: str, case: Case, rounds: int) -> None:
    """Agree, time, print one line a peer."""
    ways = theirs(case)
    check(name, case)
    seeds = itertools.count(1)
    with ExitStack() as stack:
        names = ("ours", "dense MLP", *ways, "floor")
        sides = {side: stack.enter_context(Contestant(THREADS, build, case, side)) for side in names}

        def fresh() -> None:
            seed = next(seeds)
            for side in sides.values():
                side(seed)

        times = race({key: lambda side=side: side(None) for key, side in sides.items()}, "cpu", rounds, fresh)
    medians = {peer: statistics.median(taken) for peer, taken in times.items()}
    fastest = min(ways, key=medians.__getitem__)
    config = {
        **case._asdict(), "threads": torch.get_num_threads(), "rounds": rounds, "torch": torch.__version__,
        "score_func": "softmax", "flops": case.flops, "transformers": _transformers_version(),
        "floor_gflop_per_s": round(case.flops / medians["floor"] / 1e6, 1),
        "all_ms": {peer: round(ms, 3) for peer, ms in medians.items()},
        "spread_ms": {peer: [round(min(taken), 3), round(max(taken), 3)] for peer, taken in times.items()},
    }  # fmt: skip
    for kind, peer in (("dense", "dense MLP"), ("transformers", fastest)):
        print_line(
            "cpu-layer", f"{name}/{kind}", ours=medians["ours"], peer=medians[peer], peer_name=peer,
            unit="ms forward and backward", ratio=paired_ratio(times, "ours", peer),
            floor_fraction=paired_ratio(times, "ours", "floor"), hardware=hardware(), config=config,
        )  # fmt: skip


def check(name: str, case: Case) -> None:
    """Raises SystemExit unless all give our outputs in fp32; tokens near a tie may go elsewhere in bf16."""
    x = torch.randn(case.tokens, case.model)
    want = ours(case)(x)
    for peer, way in theirs(case).items():
        block = Block(ours(case), case, *way)
        bound = AGREE["fp32" if block.dtype == torch.float32 else "bf16"]
        error = (want - block(x)).float().norm(dim=-1).div(want.norm(dim=-1).mean()).median().item()
        if not error <= bound:
            raise SystemExit(f"bench cpu-layer {name}: {peer} is off by {error:.1e}, allowed {bound:.0e}; no timing")


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def main(words: list[str] | None = None, cases: dict[str, Case] = CASES) -> None:
    """Command line; the tests give it smaller cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=cases, default=list(cases))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(words)
    torch.set_num_threads(THREADS)
    for name in options.case:
        run(name, cases[name], options.rounds)


if __name__ == "__main__":
    main()
