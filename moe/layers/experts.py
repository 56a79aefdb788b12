"""The routed experts: stacked SwiGLU weights and one call into the kernels."""

from typing import Literal

import torch
from torch import Tensor, nn

from moe_kernels import expert_mlp

__all__ = ["Experts", "multiply_in_fp8"]


class Experts(nn.Module):
    """E SwiGLU networks in Hugging Face's fused layout: `gate_up_proj` (E, 2F, D), `down_proj` (E, D, F).

    The routed half of DeepSeekMoE (arXiv:2401.06066 eq. 3; SwiGLU: arXiv:2002.05202), without a capacity: no token is
    dropped. Weights start normal with standard deviation 0.02.

    All experts live in two tensors, so every one of them takes part in every backward pass, with or without tokens.
    Choices E … E + `n_null_experts` - 1 are of no expert: they add nothing and cost no matrix product.

    Args:
        hidden_size: width D of the input.
        moe_intermediate_size: width F of one expert's SwiGLU.
        n_routed_experts: experts E.
        n_null_experts: numbers from E on that stand for no expert.
        fp8: multiply in 8 bits with scales of tiles, forward and backward, as DeepSeek-V3 was trained (arXiv:2412.19437
            §3.3); for bf16 autocast, or weights and input in bf16. On a CPU it is exact about that, and slow.
        backend: "torch" or "triton" kernels; None chooses by device.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        n_routed_experts: int,
        *,
        n_null_experts: int = 0,
        fp8: bool = False,
        backend: Literal["torch", "triton"] | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_routed_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_routed_experts, hidden_size, moe_intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)
        self.n_null_experts = n_null_experts
        self.fp8 = fp8
        self.backend = backend

    def forward(self, x_TD: Tensor, topk_index_TK: Tensor, topk_weight_TK: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Weighted sum over each token's chosen experts: (T, D) to (T, D), in the dtype of `x_TD`, or autocast's.

        Gradients reach `x_TD`, the weights of the experts and `topk_weight_TK`. The triton backend never waits for the
        device; the torch backend reads the load there.

        Args:
            x_TD: tokens.
            topk_index_TK: (T, K) int64, which experts; as `Router` gives them.
            topk_weight_TK: (T, K) fp32, what each counts.
            tokens_per_expert: (E,) int32, how often each expert occurs in `topk_index_TK`.

        Raises:
            KernelError: shapes or dtypes do not fit together, or the backend or fp8 cannot run here.
        """
        return expert_mlp(
            x_TD,
            self.gate_up_proj,
            self.down_proj,
            topk_index_TK,
            topk_weight_TK,
            tokens_per_expert=tokens_per_expert,
            null_experts=self.n_null_experts,
            fp8=self.fp8,
            backend=self.backend,
        )


def multiply_in_fp8(model: nn.Module) -> int:
    """From now on all routed experts of `model` multiply in 8 bits; returns how many layers have any."""
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    for layer in layers:
        layer.fp8 = True
    return len(layers)
