"""The routed experts: stacked SwiGLU weights and one call into the kernels."""

from typing import Literal

import torch
from torch import Tensor, nn

from moe_kernels import expert_mlp

__all__ = ["Experts"]


class Experts(nn.Module):
    """E SwiGLU networks in Hugging Face's fused layout: `gate_up_proj` (E, 2F, D), `down_proj` (E, D, F).

    All experts live in two tensors, so every one of them takes part in every backward pass, with or without tokens.
    Choices E … E + `n_null_experts` - 1 are of no expert: they add nothing and cost no matrix product.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        n_routed_experts: int,
        *,
        n_null_experts: int = 0,
        backend: Literal["torch", "triton"] | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_routed_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_routed_experts, hidden_size, moe_intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)
        self.n_null_experts = n_null_experts
        self.backend = backend

    def forward(self, x_TD: Tensor, topk_index_TK: Tensor, topk_weight_TK: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Weighted sum over each token's chosen experts: (T, D) to (T, D). Casts itself under autocast."""
        return expert_mlp(
            x_TD,
            self.gate_up_proj,
            self.down_proj,
            topk_index_TK,
            topk_weight_TK,
            tokens_per_expert=tokens_per_expert,
            null_experts=self.n_null_experts,
            backend=self.backend,
        )
