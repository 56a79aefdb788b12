"""Time expert_mlp against a composition of torch's grouped_mm and a dense SwiGLU MLP of the same FLOPs.

    python kernels/benchmarks/bench_expert_mlp.py [--device cpu|cuda] [--case NAME …] [--repeats N]

Correctness comes first: values and gradients of every contender are compared with fp32 and the run stops when one is
wrong. Contenders are interleaved and the best time of each is reported, for noise only adds; one JSON object a line.
ratio > 1 means ours is faster; floor_fraction is the time the same FLOPs take as one large matrix product, measured in
the same rounds, over ours. The dense MLP is K * F wide: the FLOPs of the active experts without routing.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from moe_kernels import expert_mlp


class Case(NamedTuple):
    """T tokens, D model, F hidden, E experts, K top-k."""

    tokens: int
    model: int
    hidden: int
    experts: int
    top_k: int
    dtype: torch.dtype


CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "e16-fp32": Case(2048, 256, 128, 16, 6, torch.float32),
        "e64-fp32": Case(2048, 256, 128, 64, 6, torch.float32),
        "e16-bf16": Case(2048, 256, 128, 16, 6, torch.bfloat16),
        "e64-bf16": Case(2048, 256, 128, 64, 6, torch.bfloat16),
    },
    "cuda": {
        "olmoe": Case(8192, 2048, 1024, 64, 8, torch.bfloat16),
        "qwen3-30b": Case(32768, 2048, 768, 128, 8, torch.bfloat16),
        "fine-grained": Case(24576, 1536, 256, 128, 8, torch.bfloat16),
    },
}


def grouped_mm_composition(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What one writes with torch alone: sort, gather, two grouped products under autograd, weighted index_add."""
    order = index.flatten().argsort(stable=True)
    token = order // index.shape[1]
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, index.flatten(), torch.ones_like(order, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)
    out = out * weight.flatten()[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, token, out)


def dense_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU over one weight of width K * F."""
    gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
    return (silu(gate) * up) @ down.t()


class Problem:
    """Inputs of a case and the contenders as functions of nothing."""

    def __init__(self, case: Case, device: str, backends: list[str]) -> None:
        torch.manual_seed(0)
        tokens, model, hidden, experts, top_k, dtype = case
        make = {"device": device, "dtype": dtype}
        self.x = torch.randn(tokens, model, **make).requires_grad_()  # type: ignore[call-overload]
        self.gate_up = (torch.randn(experts, 2 * hidden, model, **make) / model**0.5).requires_grad_()  # type: ignore[call-overload]
        self.down = (torch.randn(experts, model, hidden, **make) / hidden**0.5).requires_grad_()  # type: ignore[call-overload]
        self.index = torch.rand(tokens, experts, device=device).topk(top_k).indices
        self.weight = torch.rand(tokens, top_k, device=device).softmax(-1).requires_grad_()
        self.leaves = [self.x, self.gate_up, self.down, self.weight]
        wide = top_k * hidden
        dense_gate_up = (torch.randn(2 * wide, model, **make) / model**0.5).requires_grad_()  # type: ignore[call-overload]
        dense_down = (torch.randn(model, wide, **make) / wide**0.5).requires_grad_()  # type: ignore[call-overload]
        self.dy = torch.randn(tokens, model, **make)  # type: ignore[call-overload]
        experts_of = (self.x, self.gate_up, self.down, self.index, self.weight)
        self.contenders: dict[str, Callable[[], Tensor]] = {
            f"moe_kernels[{b}]": lambda b=b: expert_mlp(*experts_of, backend=b)  # type: ignore[misc]
            for b in backends
        }
        self.contenders["torch-grouped_mm"] = lambda: grouped_mm_composition(*experts_of)
        self.checked = list(self.contenders)
        self.contenders["dense-swiglu"] = lambda: dense_mlp(self.x, dense_gate_up, dense_down)
        self.all_leaves = {name: self.leaves for name in self.checked}
        self.all_leaves["dense-swiglu"] = [self.x, dense_gate_up, dense_down]

    def check(self) -> None:
        """Stop unless every contender agrees with the torch path in fp32."""
        exact = [t.detach().float().requires_grad_() for t in self.leaves]
        y = expert_mlp(exact[0], exact[1], exact[2], self.index, exact[3], backend="torch")
        want = [y, *torch.autograd.grad(y, exact, self.dy.float())]
        bound = 1e-4 if self.x.dtype == torch.float32 else 5e-2
        for name in self.checked:
            y = self.contenders[name]()
            for w, got in zip(want, [y, *torch.autograd.grad(y, self.leaves, self.dy)], strict=True):
                error = ((w - got.float()).abs().max() / w.abs().max()).item()
                if not error <= bound:
                    raise SystemExit(f"{name} is off by {error:.1e}, allowed {bound:.0e}: nothing is timed")

    def backward_too(self, name: str) -> Callable[[], object]:
        """Forward and backward of a contender."""
        return lambda: torch.autograd.grad(self.contenders[name](), self.all_leaves[name], self.dy)


def once(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def bench(name: str, case: Case, device: str, backends: list[str], repeats: int) -> None:
    """Check, then time one case and print its lines."""
    problem = Problem(case, device, backends)
    problem.check()
    side = 8192 if device == "cuda" else 1024
    square = torch.randn(side, side, device=device, dtype=case.dtype)
    forward_flops = 6 * case.tokens * case.top_k * case.model * case.hidden
    for phase, flops in (("forward", forward_flops), ("forward+backward", 3 * forward_flops)):
        runs: dict[str, Callable[[], object]] = dict(problem.contenders)
        if phase != "forward":
            runs = {n: problem.backward_too(n) for n in runs}
        runs["floor"] = lambda: square @ square
        times: dict[str, list[float]] = {n: [] for n in runs}
        with torch.set_grad_enabled(phase != "forward"):
            for run in runs.values():
                once(run, device)
            for _ in range(repeats):
                for n, run in runs.items():
                    times[n].append(once(run, device))
        best = {n: min(t) for n, t in times.items()}
        floor = best["floor"] * flops / (2 * side**3)
        for backend in backends:
            ours = best[f"moe_kernels[{backend}]"]
            for peer in ("torch-grouped_mm", "dense-swiglu"):
                line = {
                    "bench": "expert_mlp",
                    "case": f"{name}/{phase}",
                    "ours": round(ours, 3),
                    "peer": round(best[peer], 3),
                    "peer_name": peer,
                    "unit": "ms",
                    "ratio": round(best[peer] / ours, 3),
                    "floor_fraction": round(floor / ours, 3),
                    "hardware": hardware(device),
                    "config": {
                        **case._asdict(),
                        "dtype": str(case.dtype).removeprefix("torch."),
                        "backend": backend,
                        "repeats": repeats,
                        "torch": torch.__version__,
                    },
                }
                print(json.dumps(line), flush=True)


def hardware(device: str) -> str:
    """The GPU's name, or the processor architecture and threads used."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(CASES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs="*", help="names of cases; all of the device by default")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    cases = CASES[options.device]
    unknown = set(options.case or []) - set(cases)
    if unknown:
        parser.error(f"--case {', '.join(sorted(unknown))} unknown: use {', '.join(cases)}")
    backends = ["torch", "triton"] if options.device == "cuda" else ["torch"]
    for name in options.case or cases:
        bench(name, cases[name], options.device, backends, options.repeats)


if __name__ == "__main__":
    main()
