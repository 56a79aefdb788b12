"""The kernels at the shapes that matter, against their peers and against what the device can do.

    scripts/bench kernels [--case NAME …] [--routing balanced skewed] [--seconds S] [--energy [S] | --alternatives]

Values and gradients of every contender are compared with the torch reference in fp32 before anything is timed: ours
stops the run when it is wrong, a peer that is wrong or fails is named and left out. Parts of a case:

    experts   routing decision to weighted sum: TFLOP/s, at 6 T K D F operations forward and 12 backward
    layer     the same with the router's product and choice before it
    router, sort, combine     the pieces that only move bytes: GB/s, at the fewest bytes they can move

`floor_fraction` is the share reached of a large bf16 product, or of a large copy, measured in the same rounds. With
--energy every contender runs for ten seconds or S between two readings of the meter: joules a call. With --alternatives
our own other configurations are the peers (`kernel_alternatives.py`). At DeepSeek-V3's shape our own 8-bit products are
one of the peers: their ratio below 1 says how much faster than bf16 they are.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from kernel_alternatives import alternatives
from kernel_cases import CPU, FP8, GPU, ROUTINGS, Case, Inputs
from kernel_peers import Contender, find_peers, grouped_mm_experts, ours, ours_in_fp8, softmax_topk
from measure import Times, hardware, note, paired_ratio, print_line, race
from torch import Tensor

from moe_kernels import sort_by_expert, topk_route
from moe_kernels.combine import sum_slots

BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of `relative_error`
PRODUCT_SIDE, COPY_BYTES = {"cuda": 8192, "cpu": 512}, {"cuda": 4 * 2**30, "cpu": 2**24}
GIB = 2**30

Work = dict[str, Callable[[], object]]


class Bench:
    """One case with one routing on one device."""

    def __init__(
        self, name: str, case: Case, routing: str, device: str, rounds: int, *, against_ourselves: bool = False
    ) -> None:
        self.name, self.case, self.device, self.rounds = f"{name}/{routing}", case, device, rounds
        self.backend = "triton" if device == "cuda" else "torch"
        self.inputs = Inputs(case, routing, device)
        self.mine = f"moe_kernels {self.backend}"
        mine = ours(self.inputs, self.backend)
        others = (
            {f"{self.mine}, {other}": mine._replace(within=within) for other, within in alternatives(device).items()}
            if against_ourselves
            else find_peers(self.inputs)
        )
        if name in FP8 and not against_ourselves and (in_fp8 := ours_in_fp8(self.inputs, self.backend)):
            others[f"{self.mine}, fp8"] = in_fp8
        self.contenders = {self.mine: mine, **others}
        side = PRODUCT_SIDE[device]
        square = torch.randn(side, side, device=device).to(case.dtype)
        self.product_flops = 2 * side**3
        self.product = lambda: square @ square
        source = torch.randint(255, (COPY_BYTES[device] // 2,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.copy = lambda: target.copy_(source)

    def check(self) -> None:
        """Values and gradients against the reference in fp32. Raises SystemExit when ours is wrong."""
        names = ("x", "gate_up", "down", "weight")
        leaves = {n: getattr(self.inputs, n).detach().float().requires_grad_() for n in names}
        exact = self.inputs.but(case=self.case._replace(dtype=torch.float32, masters=False), **leaves)
        wanted = results(ours(exact, "torch"), self.inputs.dy.float())
        for name, contender in list(self.contenders.items()):
            bound = contender.bound or BOUND[self.case.dtype]
            try:
                found = results(contender, self.inputs.dy)
                errors = [relative_error(w, f) for w, f in zip(wanted, found, strict=True)]
                wrong = [error for error in errors if not error <= bound]  # so is NaN
                fault = f"is off by {wrong[0]:.1e}" if wrong else None
            except Exception as failure:
                if name == self.mine:
                    raise
                fault = f"fails: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            if fault and name == self.mine:
                raise SystemExit(f"{self.name}: {name} {fault}, allowed {bound:.0e}: nothing is timed")
            if fault:
                note(f"{self.name}: {name} {fault}; it is left out")
                del self.contenders[name]

    def experts(self) -> None:
        """Forward alone, then forward and backward."""
        peak = {name: self.peak_gib(contender) for name, contender in self.contenders.items()}
        for phase, flops in (("forward", self.case.forward_flops), ("forward+backward", 3 * self.case.forward_flops)):
            self.rates(f"experts/{phase}", {n: self.runs(c, phase) for n, c in self.contenders.items()}, flops, peak)

    def layer(self) -> None:
        """Router's product, choice, experts, sum. The peer chooses with torch's own softmax and topk."""
        i, case = self.inputs, self.case

        def routed(backend: str) -> Tensor:
            logits = i.x @ i.router.t()
            route = topk_route(logits, top_k=case.top_k, score_func="softmax", backend=backend)
            index, weight, _, counts = route
            return ours(i.but(index=index, weight=weight, counts=counts), backend).forward()

        def composed() -> Tensor:
            index, weight = softmax_topk((i.x @ i.router.t()).float(), case.top_k)
            return grouped_mm_experts(i.x, i.gate_up, i.down, index, weight)

        leaves = [i.x, i.router, i.gate_up, i.down]
        sides = {self.mine: Contender(lambda: routed(self.backend), leaves),
                 "torch topk, grouped_mm": Contender(composed, leaves)}  # fmt: skip
        flops = case.forward_flops + case.router_flops
        peak = {name: self.peak_gib(side) for name, side in sides.items()}
        for phase, times in (("forward", 1), ("forward+backward", 3)):
            work = {name: self.runs(side, phase) for name, side in sides.items()}
            self.rates(f"layer/{phase}", work, times * flops, peak)

    def pieces(self) -> None:
        """Ours against the torch backend, where they differ, the router's plain peer, and the copy."""
        i, case = self.inputs, self.case
        work: dict[str, Work] = {piece: {} for piece in case.piece_bytes()}

        def routing(name: str, route: Callable[[], Tensor]) -> None:
            """Of a function that returns the weights of the chosen."""
            weight = route()
            gradient = torch.randn_like(weight)
            work["router/forward"][name] = route
            work["router/backward"][name] = lambda: torch.autograd.grad(weight, i.logits, gradient, retain_graph=True)

        for backend in ["triton", "torch"] if self.device == "cuda" else ["torch"]:
            name, order = f"{backend} backend", sort_by_expert(i.index, case.experts, backend=backend)
            rows = i.x.detach().index_select(0, order.token_R)
            routing(name, lambda b=backend: topk_route(
                i.logits, top_k=case.top_k, score_func="softmax", backend=b
            ).topk_weight_TK)  # fmt: skip
            work["sort/forward"][name] = lambda b=backend: sort_by_expert(i.index, case.experts, backend=b)
            work["combine/forward"][name] = lambda b=backend, r=rows, p=order.place_R: sum_slots(r, p, case.top_k, b)
        routing("torch softmax, topk", lambda: softmax_topk(i.logits, case.top_k)[1])
        with torch.no_grad():
            for piece, runs in work.items():
                with torch.enable_grad() if piece == "router/backward" else nullcontext():
                    self.bandwidths(piece, runs, case.piece_bytes()[piece])

    def runs(self, contender: Contender, phase: str) -> Callable[[], object]:
        """The contender in a phase, as a function of nothing."""

        def forward() -> object:
            with torch.no_grad(), contender.within():
                return contender.forward()

        def both() -> object:
            with contender.within():
                return torch.autograd.grad(contender.forward(), contender.leaves, self.inputs.dy)

        return forward if phase == "forward" else both

    def peak_gib(self, contender: Contender) -> float | None:
        """The most device memory a forward and backward takes beside what was there before; None on a CPU."""
        if self.device == "cpu":
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.runs(contender, "forward+backward")()
        return round((torch.cuda.max_memory_allocated() - before) / GIB, 3)

    def rates(self, part: str, work: Work, flops: int, peak: Mapping[str, float | None]) -> None:
        """Lines in TFLOP/s, ours against each other."""
        times = race({**work, "product": self.product}, self.device, self.rounds)
        product = self.product_flops / statistics.median(times["product"]) / 1e9
        rate = {name: flops / statistics.median(times[name]) / 1e9 for name in work}
        for peer in [name for name in work if name != self.mine]:
            print_line(
                "kernels", f"{self.name}/{part}", ours=rate[self.mine], peer=rate[peer], peer_name=peer, unit="TFLOP/s",
                ratio=paired_ratio(times, self.mine, peer), floor_fraction=rate[self.mine] / product,
                hardware=hardware(self.device), config=self.config(times, peer) | {
                    "flops": flops, "product_tflop_per_s": round(product, 2),
                    "peak_gib": {"ours": peak[self.mine], "peer": peak[peer]},
                },
            )  # fmt: skip

    def bandwidths(self, part: str, work: Work, size: int) -> None:
        """Lines in GB/s. An implementation without another is its own peer: the floor says how good it is."""
        times = race({**work, "copy": self.copy}, self.device, self.rounds)
        copy = COPY_BYTES[self.device] / statistics.median(times["copy"]) / 1e6
        rate = {name: size / statistics.median(times[name]) / 1e6 for name in work}
        mine = next(iter(work))
        for peer in [name for name in work if name != mine] or [mine]:
            print_line(
                "kernels", f"{self.name}/{part}", ours=rate[mine], peer=rate[peer], peer_name=peer, unit="GB/s",
                ratio=paired_ratio(times, mine, peer), floor_fraction=rate[mine] / copy,
                hardware=hardware(self.device),
                config=self.config(times, peer, mine) | {"bytes": size, "copy_gb_per_s": round(copy, 1)},
            )  # fmt: skip

    def energy(self, seconds: float) -> None:
        """Joules a call of forward and backward, over `seconds` of each contender."""
        from kernel_energy import joules_per_call

        work = {name: self.runs(c, "forward+backward") for name, c in self.contenders.items()}
        flops = 3 * self.case.forward_flops
        found = {name: joules_per_call(run, seconds) for name, run in {**work, "product": self.product}.items()}
        floor_j = found["product"].joules * flops / self.product_flops
        for peer in [name for name in work if name != self.mine]:
            mine, other = found[self.mine], found[peer]
            print_line(
                "kernels", f"{self.name}/experts/energy", ours=mine.joules, peer=other.joules, peer_name=peer,
                unit="J per forward and backward", ratio=other.joules / mine.joules,
                floor_fraction=floor_j / mine.joules, hardware=hardware(self.device),
                config=self.config({}, peer) | {"ours_energy": mine._asdict(), "peer_energy": other._asdict(),
                                                "product_energy": found["product"]._asdict()},
            )  # fmt: skip

    def config(self, times: Times, peer: str, mine: str | None = None) -> dict[str, Any]:
        """Everything that decides the numbers, and how far they lie apart."""
        names = {"ours": mine or self.mine, "peer": peer}
        return {
            **self.case._asdict(), "dtype": str(self.case.dtype).removeprefix("torch."), "backend": self.backend,
            "max_load_over_mean": self.inputs.max_over_mean, "rounds": self.rounds, "torch": torch.__version__,
            "triton": _version("triton"), "transformers": _version("transformers"),
            "median_ms": {side: _median(times, name) for side, name in names.items()},
            "spread_ms": {
                side: [round(end(times[name]), 4) for end in (min, max)]
                for side, name in names.items()
                if name in times
            },
        }  # fmt: skip


def results(contender: Contender, dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, gate_up, down and weight, in fp32 and our layout."""
    with contender.within():
        y = contender.forward()
        d_x, d_gate_up, d_down, d_weight = torch.autograd.grad(y, contender.leaves, dy)
    return [t.float() for t in (y.detach(), d_x, contender.as_ours(d_gate_up), d_down, d_weight)]


def relative_error(want: Tensor, got: Tensor) -> float:
    """The difference's norm over the norm; or a tenth of the worst row's over the mean row's, so that none is lost."""
    difference, size = (t.reshape(-1, t.shape[-1]).norm(dim=-1) for t in (want - got, want))
    mean = size.square().mean().sqrt()
    return float(torch.maximum(difference.square().mean().sqrt(), difference.max() / 10) / mean)


def _median(times: Times, name: str) -> float | None:
    return round(statistics.median(times[name]), 4) if name in times else None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(words: list[str] | None = None, cases: dict[str, Case] | None = None) -> None:
    """Command line; the tests give it smaller cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--case", nargs="*", metavar="NAME", help=f"of {', '.join(GPU)} on a GPU, {', '.join(CPU)} on a CPU"
    )
    parser.add_argument("--routing", nargs="*", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further case after so many")
    parser.add_argument(
        "--alternatives", action="store_true", help="the experts against other configurations of themselves, on a GPU"
    )
    parser.add_argument("--energy", type=float, nargs="?", const=10.0, metavar="S", help="joules instead of times")
    options = parser.parse_args(words)
    known = cases or (GPU if options.device == "cuda" else CPU)
    unknown = set(options.case or []) - set(known)
    if unknown:
        parser.error(f"--case {', '.join(sorted(unknown))} unknown: use {', '.join(known)}")
    if options.alternatives and options.device == "cpu":
        parser.error("--alternatives needs a GPU: on a CPU no kernel is launched")
    start = time.monotonic()
    if options.alternatives and not alternatives(options.device):
        note("no alternative differs on this device")
    for name in options.case or known:
        for routing in options.routing:
            if time.monotonic() - start > options.seconds:
                note(f"{name}/{routing} is left out: {options.seconds:.0f} s are over")
                continue
            bench = Bench(
                name, known[name], routing, options.device, options.rounds, against_ourselves=options.alternatives
            )
            bench.check()
            if options.energy:
                bench.energy(options.energy)
                continue
            bench.experts()
            if options.alternatives:
                continue
            bench.layer()
            if routing == options.routing[-1]:
                bench.pieces()
            del bench


if __name__ == "__main__":
    main()
