"""The mixture-of-experts feed-forward: router, routed experts, shared experts (DeepSeekMoE, arXiv:2401.06066)."""

from typing import Literal

from torch import Tensor, nn

from moe.layers.experts import Experts
from moe.layers.feed_forward import FeedForward
from moe.layers.precision import as_multiplied
from moe.layers.router import Router

__all__ = ["MoE"]


class MoE(nn.Module):
    """A drop-in for a transformer's feed-forward, (…, hidden_size) to (…, hidden_size). No token is ever dropped.

    y = shared(x) + sum over the K chosen experts of weight * expert(x); eqs 12-15 of DeepSeek-V3, arXiv:2412.19437,
    without the residual.

    Args:
        hidden_size: width D of the input.
        n_routed_experts: experts E the router chooses from.
        num_experts_per_tok: experts K each token is sent to.
        moe_intermediate_size: width F of one expert's SwiGLU.
        n_shared_experts: experts every token passes, computed as one SwiGLU of that many widths.
        n_null_experts: further choices of the router that compute nothing, so that a token may use fewer than K.
        score_func, topk_method, n_group, topk_group, norm_topk_prob, routed_scaling_factor: see `moe.ModelConfig`.
        fp8: the routed experts multiply in 8 bits; see `Experts`.
        backend: "torch" or "triton" kernels; None chooses by device.

    To balance its load while training, call `moe.Balancer(model).step()` after each optimizer step.

    Raises:
        ConfigError: K is not between 1 and E, or groups do not divide the experts.

    Example:
        >>> layer = MoE(64, 8, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        moe_intermediate_size: int,
        n_shared_experts: int = 0,
        *,
        n_null_experts: int = 0,
        score_func: Literal["sigmoid", "softmax"] = "sigmoid",
        topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc",
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        fp8: bool = False,
        backend: Literal["torch", "triton"] | None = None,
    ) -> None:
        super().__init__()
        self.router = Router(
            hidden_size,
            n_routed_experts,
            num_experts_per_tok,
            n_null_experts=n_null_experts,
            score_func=score_func,
            topk_method=topk_method,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
            backend=backend,
        )
        self.experts = Experts(
            hidden_size,
            moe_intermediate_size,
            n_routed_experts,
            n_null_experts=n_null_experts,
            fp8=fp8,
            backend=backend,
        )
        shared = n_shared_experts * moe_intermediate_size
        self.shared_experts = FeedForward(hidden_size, shared) if shared else None

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """(…, hidden_size) to the same shape, in the dtype of `x` or autocast's; routed in fp32.

        The triton backend never waits for the device.

        Args:
            counted: (…) bool, false for padding: such tokens are computed like all, but are no load to balance and have
                no part in balance losses.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        route = self.router(x_TD, x.shape[:-2].numel(), None if counted is None else counted.reshape(-1))
        x_TD = as_multiplied(x_TD)
        y_TD = self.experts(x_TD, route.topk_index_TK, route.topk_weight_TK, route.tokens_per_expert_E)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x)
