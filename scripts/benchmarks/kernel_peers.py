"""Who the expert MLP is measured against, each as a function of the same inputs.

A peer that is not installed is left out. The folder `peers/` at the repository root, which git ignores, is searched
too: after `pip install --no-deps --target peers liger-kernel` it can be carried to a machine without a network.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernel_cases import Case, Inputs
from measure import note
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from moe_kernels import expert_mlp
from moe_kernels.configs import obstacle_to_fp8

__all__ = ["Contender", "find_peers", "grouped_mm_experts", "ours", "ours_in_fp8", "softmax_topk"]

PEERS = Path(__file__).resolve().parents[2] / "peers"
LARGEST_COPY_BYTES = 16 * 2**30  # batched_mm copies a weight for every row


class Contender(NamedTuple):
    """A way to compute the experts.

    forward   y (T, D)
    leaves    what gradients are taken in: x, gate_up, down, weight, as the contender stores them
    as_ours   its gradient of gate_up in our layout, gate rows first
    within    what to be within while it runs, forward and backward
    bound     of its error, where that of the dtype does not hold
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    as_ours: Callable[[Tensor], Tensor] = lambda gradient: gradient
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    bound: float | None = None


def ours(inputs: Inputs, backend: str) -> Contender:
    """`expert_mlp` by the given backend, under autocast where the weights are fp32 masters."""
    i, case = inputs, inputs.case

    def run() -> Tensor:
        with torch.autocast(i.device, case.dtype, enabled=case.masters):
            return expert_mlp(i.x, i.gate_up, i.down, i.index, i.weight, tokens_per_expert=i.counts, backend=backend)

    return Contender(run, i.leaves)


def ours_in_fp8(inputs: Inputs, backend: str) -> Contender | None:
    """The same with 8-bit products; None, and a sentence, where the device has none."""
    i = inputs
    if lack := obstacle_to_fp8(torch.device(i.device)):
        note(f"fp8 is left out: it {lack}")
        return None

    def run() -> Tensor:
        with torch.autocast(i.device, torch.bfloat16):
            return expert_mlp(
                i.x, i.gate_up, i.down, i.index, i.weight, tokens_per_expert=i.counts, fp8=True, backend=backend
            )

    return Contender(run, i.leaves, bound=0.15)


def softmax_topk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(index, weight) (T, K) of logits (T, E), as one writes a router with torch alone."""
    weight, index = logits.softmax(-1).topk(top_k, dim=-1)
    return index, weight / weight.sum(-1, keepdim=True)


def grouped_mm_experts(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """What one writes with torch alone: sort, gather, two grouped products under autograd, weighted index_add.

    Autocast does not know grouped_mm: master weights are cast by hand.
    """
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    order = index.flatten().argsort(stable=True)
    token = order // index.shape[1]
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, index.flatten(), torch.ones_like(order, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)
    out = out * weight.flatten()[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, token, out)


def find_peers(inputs: Inputs) -> dict[str, Contender]:
    """All that can be had here, by name."""
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    i, cuda = inputs, inputs.device == "cuda"
    given = (i.x, i.gate_up, i.down, i.index, i.weight)
    found = {"torch grouped_mm": Contender(lambda: grouped_mm_experts(*given), i.leaves)}
    if cuda:
        found["torch reference"] = ours(inputs, "torch")
    makers: dict[str, tuple[str, Callable[[], Contender]]] = {
        f"transformers {name}": ("transformers", lambda name=name: _transformers(inputs, name))  # type: ignore[misc]
        for name in _transformers_names(inputs.case)
    }
    if cuda:
        makers["Liger"] = "liger_kernel", lambda: _liger(inputs)
        makers["ScatterMoE"] = "scattermoe", lambda: _scattermoe(inputs)
        makers["SonicMoE"] = "sonicmoe", lambda: _sonicmoe(inputs)
    for name, (module, make) in makers.items():
        if not _have(module):
            continue
        try:
            found[name] = make()
        except Exception as failure:  # another version, or what it needs is missing
            note(f"{name} is left out: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}")
    return found


def _have(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _transformers_names(case: Case) -> list[str]:
    copied = case.rows * 2 * case.hidden * case.model * case.dtype.itemsize
    return ["eager", "grouped_mm", *(["batched_mm"] if copied <= LARGEST_COPY_BYTES else [])]


def _transformers(inputs: Inputs, name: str) -> Contender:
    """Qwen3-MoE's experts; their three implementations serve every such model of transformers."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    case = inputs.case
    config = Qwen3MoeConfig(hidden_size=case.model, moe_intermediate_size=case.hidden, num_experts=case.experts)
    config._experts_implementation = name
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(w.detach()) for w in (inputs.gate_up, inputs.down))
    leaves = [inputs.x, experts.gate_up_proj, experts.down_proj, inputs.weight]
    weight_dtype = inputs.case.dtype
    return Contender(lambda: experts(inputs.x, inputs.index, inputs.weight.to(weight_dtype)), leaves)


def _liger(inputs: Inputs) -> Contender:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    index, i = inputs.index.int(), inputs
    return Contender(lambda: LigerFusedMoEFunction.apply(i.x, i.gate_up, i.down, index, i.weight), i.leaves)


def _scattermoe(inputs: Inputs) -> Contender:
    """Its weights have the rows of `up` first."""
    from scattermoe.mlp import GLUMLP

    case = inputs.case
    with torch.device("meta"):
        mlp = GLUMLP(case.model, case.hidden, case.experts, case.top_k, activation=nn.SiLU())
    mlp.experts.weight = nn.Parameter(_swapped(inputs.gate_up.detach()))
    mlp.output_experts.weight = nn.Parameter(inputs.down.detach())
    leaves = [inputs.x, mlp.experts.weight, mlp.output_experts.weight, inputs.weight]
    return Contender(lambda: mlp(inputs.x, inputs.weight.to(case.dtype), inputs.index), leaves, _swapped)


def _swapped(gate_up: Tensor) -> Tensor:
    return torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)


def _sonicmoe(inputs: Inputs) -> Contender:
    """Through its entry for choices made elsewhere, whose arguments differ between versions."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    i, case = inputs, inputs.case
    token = torch.arange(case.tokens, device=i.x.device, dtype=torch.int32).repeat_interleave(case.top_k)
    expert = i.index.flatten().int()
    known = inspect.signature(moe_general_routing_inputs).parameters
    more: dict[str, Any] = {"stream_id": None, "_stream_id": None, "concat_layout": True}
    more = {name: value for name, value in more.items() if name in known}

    def run() -> Tensor:
        return moe_general_routing_inputs(
            i.x, i.weight.flatten().to(case.dtype), token, expert, i.gate_up.permute(1, 2, 0), None,
            i.down.permute(1, 2, 0), None, E=case.experts, activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(), **more,
        )[0]  # fmt: skip

    return Contender(run, i.leaves)
