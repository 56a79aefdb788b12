"""The shapes the kernels are measured at, and their inputs, operations and bytes.

Routing is made as a router makes it, by a product: the last feature of every token is 1, so the last column of the
router's weight says how popular an expert is. `balanced` has equal columns and loads differ by chance alone; `skewed`
has log-popularities that are normal with a standard deviation of 0.5, beside logits of standard deviation 1, like a
router that nobody balances. Each line of the benchmark says the fullest expert's load over the mean.

Letters: T tokens, D model, F hidden, E experts, K top-k, R = T K rows.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import topk_route

__all__ = ["CPU", "FP8", "GPU", "ROUTINGS", "Case", "Inputs"]

ROUTINGS = {"balanced": 0.0, "skewed": 0.5}  # standard deviation of the experts' log-popularity


class Case(NamedTuple):
    """T tokens, D model, F hidden, E experts, K top-k, and the dtype of activations and weights.

    masters: experts' weights are fp32 and multiplied under autocast to `dtype`, as `train.precision=bf16` trains on one
    GPU or under DistributedDataParallel; else of `dtype`, as FSDP and DeepSpeed give them.
    """

    tokens: int
    model: int
    hidden: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    masters: bool = False

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the experts' weights, and so of their gradients."""
        return torch.float32 if self.masters else self.dtype

    @property
    def forward_flops(self) -> int:
        """Of the three products of all chosen experts; the backward pass has twice as many."""
        return 6 * self.rows * self.model * self.hidden

    @property
    def router_flops(self) -> int:
        """Of the product that makes the logits, forward."""
        return 2 * self.tokens * self.model * self.experts

    def piece_bytes(self) -> dict[str, int]:
        """The fewest bytes of each piece between the products: every input read once, every output written once."""
        token_rows, size = self.tokens * self.model * self.dtype.itemsize, self.rows * self.model * self.dtype.itemsize
        scores, slots = 4 * self.tokens * self.experts, self.rows
        return {
            "router/forward": 2 * scores + (8 + 4) * slots,  # logits, scores; index int64, weight fp32
            "router/backward": 2 * scores + (8 + 4) * slots,
            "sort/forward": (8 + 4 + 4) * slots,  # index; order, place
            "combine/forward": 4 * slots + size + token_rows,
        }


GPU = {
    "qwen3-30b": Case(32768, 2048, 768, 128, 8),
    "fine-grained-7b": Case(24576, 1536, 256, 128, 8),
    "deepseek-v3-rank": Case(8192, 7168, 2048, 32, 8),  # the 32 experts a rank of 8 holds, every choice among them
    "olmoe": Case(8192, 2048, 1024, 64, 8),
}
GPU["qwen3-30b-masters"] = GPU["qwen3-30b"]._replace(masters=True)
FP8 = {"deepseek-v3-rank"}  # also measured with 8-bit products
CPU = {
    "tiny-fp32": Case(256, 64, 32, 16, 4, torch.float32),
    "tiny-bf16": Case(256, 64, 32, 16, 4, torch.bfloat16),
    "tiny-masters": Case(256, 64, 32, 16, 4, torch.bfloat16, masters=True),
}


class Inputs:
    """Leaves of a case, and what its router says. All values are random and near one."""

    def __init__(self, case: Case, routing: str, device: str) -> None:
        make = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.randn(shape, generator=make, device=device).mul_(scale).to(dtype)

        def weight(*shape: int) -> Tensor:
            return normal(*shape, scale=shape[-1] ** -0.5, dtype=case.weight_dtype).requires_grad_()

        self.case, self.device = case, device
        x = normal(case.tokens, case.model)
        x[:, -1] = 1
        router = torch.nn.functional.normalize(normal(case.experts, case.model))  # a longer row is chosen more often
        router[:, -1] = normal(case.experts, scale=ROUTINGS[routing])
        self.x, self.router = x.requires_grad_(), router.requires_grad_()
        self.gate_up = weight(case.experts, 2 * case.hidden, case.model)
        self.down = weight(case.experts, case.model, case.hidden)
        self.dy = normal(case.tokens, case.model)
        with torch.no_grad():
            self.logits = (self.x @ self.router.t()).float()
            route = topk_route(self.logits, top_k=case.top_k, score_func="softmax", backend="torch")
        self.logits.requires_grad_()
        self.index, self.counts = route.topk_index_TK, route.tokens_per_expert_E
        self.weight = route.topk_weight_TK.detach().clone().requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        """What the expert MLP is differentiated in."""
        return [self.x, self.gate_up, self.down, self.weight]

    def but(self, **changed: Tensor | Case) -> "Inputs":
        """The same inputs with some of them replaced."""
        other = copy.copy(self)
        vars(other).update(changed)
        return other

    @property
    def max_over_mean(self) -> float:
        """The fullest expert's load over the mean."""
        return round((self.counts.max() / self.counts.float().mean()).item(), 3)
