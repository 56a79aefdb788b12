"""The router: which experts a token is sent to, and with what weight (DeepSeek-V3, arXiv:2412.19437 eqs 12-16).

Scores are computed in fp32 whatever the precision around them. The experts are chosen by score + expert_bias and
weighted by the score alone, so the bias steers load without touching the output's scale or receiving a gradient.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe import balance
from moe.config.routing import routing_fault
from moe.errors import ConfigError
from moe_kernels import RouteResult, RouteStatistics, topk_route_with_statistics

__all__ = ["LossWeights", "Router", "recomputation", "take_balance_loss"]


class LossWeights(NamedTuple):
    """Weights of the losses a router adds up: `moe.balance`'s load_balancing_loss, sequence_loss and z_loss."""

    aux: float
    sequence: float
    z: float

    @property
    def need_shares(self) -> bool:
        """Whether one of them is a function of normalised scores."""
        return max(self.aux, self.sequence) > 0


class Router(nn.Module):
    """Linear scores over the experts and the choice of `num_experts_per_tok` of them.

    `n_null_experts` further experts, numbered after the others, compute nothing (zero experts of MoE++,
    arXiv:2410.07348): a token that chooses one passes fewer real ones. They are scored, weighted and balanced like all,
    so at even load a token passes K E / (E + nulls) real experts in the mean.

    `expert_bias` (E,) is an fp32 buffer that stays fp32 through `.to(dtype)` and mixed precision; it exists when
    `topk_method="noaux_tc"` and is moved by `moe.Balancer`, never by the optimizer. `tokens_per_expert` (E,) adds up
    the load of training forwards until the balancer reads and clears it; a plain tensor, not a buffer, because
    DistributedDataParallel overwrites buffers with the first rank's.

    `first_choice` adds up the weight of each token's first expert, before scaling; `collect_margins`, set by
    `moe.Balancer` for quantile balancing, adds up `margin_histogram` (E, bins).

    `choices`, set by `moe.RouteReplay`, gives the experts to take in place of the largest scores. While `observed` is
    set, by `moe.balancer.LoadCounter`, every forward adds to `observed_load`, in whatever mode.

    `loss_weights` is None unless `moe.Balancer` asks for losses; training forwards then leave theirs in
    `balance_loss`, for `take_balance_loss`.

    Args:
        hidden_size: width D of the input.
        n_routed_experts: experts E to choose from.
        num_experts_per_tok: experts K each token is sent to.
        n_null_experts: further choices that compute nothing.
        score_func: how logits become scores.
        topk_method: how scores become a choice; "noaux_tc" is the one with an expert bias.
        n_group, topk_group: groups the experts are in, and how many of them a token may choose from.
        norm_topk_prob: the chosen experts' weights sum to 1 before scaling.
        routed_scaling_factor: factor on the weights.
        backend: "torch" or "triton" kernels; None chooses by device.
    """

    expert_bias: Tensor | None
    tokens_per_expert: Tensor | None
    margin_histogram: Tensor | None
    first_choice: Tensor | None
    loss_weights: LossWeights | None
    balance_loss: Tensor | None
    choices: Callable[[Tensor], Tensor] | None
    observed_load: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        *,
        n_null_experts: int = 0,
        score_func: Literal["sigmoid", "softmax"] = "sigmoid",
        topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "noaux_tc",
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        backend: Literal["torch", "triton"] | None = None,
    ) -> None:
        super().__init__()
        arguments = {
            "n_routed_experts": n_routed_experts, "n_null_experts": n_null_experts,
            "num_experts_per_tok": num_experts_per_tok, "topk_method": topk_method, "n_group": n_group,
            "topk_group": topk_group,
        }  # fmt: skip
        fault = routing_fault(**arguments)  # type: ignore[arg-type]
        if fault:
            name, mend = fault
            raise ConfigError(f"{name}={arguments[name]!r} {mend}")
        rows = n_routed_experts + n_null_experts
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        bias = torch.zeros(rows, dtype=torch.float32) if topk_method == "noaux_tc" else None
        self.register_buffer("expert_bias", bias)
        self.choices = None
        self.observed = False
        self.observed_load = None
        self.collect_margins = False
        self.loss_weights = None
        self.forget()
        self.n_routed_experts = n_routed_experts
        self.n_null_experts = n_null_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.score_func = score_func
        self.topk_method = topk_method
        self.n_group = n_group
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.backend = backend

    def forward(self, x_TD: Tensor, sequences: int = 1, counted_T: Tensor | None = None) -> RouteResult:
        """Route T tokens of width D, which are `sequences` sequences of equal length.

        Gives (T, K) int64 experts by falling selection score, ties to the lowest number; their (T, K) fp32 weights and
        the (T, E) fp32 scores, both with gradients; and the (E,) int32 load. Nothing waits for the device.

        Counts load only in training, with gradients and a weight that is trained, so neither evaluation nor a frozen
        teacher steers; and only the tokens that `counted_T` (T,) bool says, when it is given: padding is no load.

        Raises:
            KernelError: K, E and the groups do not fit together, or the backend cannot run here.
            ConfigError: a balance loss was asked for within reentrant activation checkpointing.
        """
        logits_TE = _linear_in_fp32(x_TD, self.weight)
        recording = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        need_shares = recording and self.loss_weights is not None and self.loss_weights.need_shares
        route, statistics = topk_route_with_statistics(
            logits_TE,
            self.expert_bias,
            top_k=self.num_experts_per_tok,
            score_func=self.score_func,
            topk_method=self.topk_method,
            n_group=self.n_group,
            topk_group=self.topk_group,
            norm_topk_prob=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
            chosen_TK=None if self.choices is None else self.choices(x_TD),
            counted_T=counted_T,
            count_margins=recording and self.collect_margins and self.expert_bias is not None,
            sequences=sequences if need_shares else 0,
            backend=self.backend,
        )
        if self.observed:
            self.observed_load = _plus(self.observed_load, statistics.load_E)
        if recording:
            self._record(route, statistics, logits_TE, counted_T)
        return route

    def forget(self) -> None:
        """Drop everything recorded since the balancer last read it."""
        self.tokens_per_expert = self.margin_histogram = self.first_choice = self.balance_loss = None

    def _record(
        self, route: RouteResult, statistics: RouteStatistics, logits_TE: Tensor, counted_T: Tensor | None
    ) -> None:
        checkpointing = recomputation()
        if self.loss_weights is not None:
            if checkpointing == "replaces":
                raise ConfigError(
                    "a balance loss cannot leave a reentrantly checkpointed region; "
                    "call torch.utils.checkpoint.checkpoint with use_reentrant=False, or set the alphas to 0"
                )
            # computed in a repetition too: its backward needs the tensors saved on the way
            loss = self._losses(statistics, logits_TE, counted_T, self.loss_weights)
            self.balance_loss = loss if checkpointing == "" else self.balance_loss
        if checkpointing == "repeats":
            return
        with torch.no_grad():
            # out of place: an in-place add would trip activation checkpointing's check on recomputation
            self.tokens_per_expert = _plus(self.tokens_per_expert, statistics.load_E)
            weights_T = route.topk_weight_TK[:, 0] if counted_T is None else route.topk_weight_TK[:, 0] * counted_T
            first = weights_T.sum(dtype=torch.float64) / self.routed_scaling_factor
            self.first_choice = _plus(self.first_choice, first)
            if statistics.margins_EM is not None:
                self.margin_histogram = _plus(self.margin_histogram, statistics.margins_EM)

    def _losses(
        self, statistics: RouteStatistics, logits_TE: Tensor, counted_T: Tensor | None, weights: LossWeights
    ) -> Tensor:
        """The micro-batch's weighted losses; its own tokens are the denominator, on this rank alone."""
        total = logits_TE.new_zeros(())
        load_BE, shares_BE = statistics.preferred_BE, statistics.shares_BE
        if load_BE is not None and shares_BE is not None:
            tokens_B = load_BE.sum(1) // self.num_experts_per_tok
            if weights.aux:
                pooled = statistics.load_E.unsqueeze(0), shares_BE.sum(0, True), tokens_B.sum(0, True)
                total = total + weights.aux * balance.balance_loss(*pooled)
            if weights.sequence:
                total = total + weights.sequence * balance.balance_loss(load_BE, shares_BE, tokens_B)
        if weights.z:
            total = total + weights.z * balance.z_loss(logits_TE, counted_T)
        return total

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves like any module, but casts leave `expert_bias` in fp32: a bf16 bias cannot take steps of 0.001."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.expert_bias = before.to(after.device)
        return self


def _linear_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, cast to fp32 first whatever autocast says."""
    if x.dtype == torch.float32 or torch.compiler.is_compiling():  # the compiler casts again by itself
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.float())
    return _LinearInFp32.apply(x, weight)


class _LinearInFp32(torch.autograd.Function):
    """The same for 16-bit x, which it keeps as it is: in fp32 it would be kept once more, at twice the size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx = dy @ weight.float() if ctx.needs_input_grad[0] else None
            dw = dy.t() @ x.float() if ctx.needs_input_grad[1] else None
        return None if dx is None else dx.to(x.dtype), None if dw is None else dw.to(weight.dtype)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more.detach() if total is None else total + more


def recomputation() -> Literal["", "repeats", "replaces"]:
    """Whether activation checkpointing runs this forward, from within the backward pass, a second time.

    Non-reentrant checkpointing repeats a forward that was recorded; the reentrant kind runs its first forward without
    gradients, so that the second is the one to record. torch.compile recomputes below Python, and records once.
    """
    if torch.compiler.is_compiling():
        return ""
    node = torch._C._current_autograd_node()
    if node is None:
        return ""
    return "replaces" if "CheckpointFunction" in node.name() else "repeats"


def take_balance_loss(model: nn.Module) -> Tensor | None:
    """Mean over the routers in `model` of what their last training forward left, once; None when nothing did."""
    losses = []
    for module in model.modules():
        if isinstance(module, Router) and module.balance_loss is not None:
            losses.append(module.balance_loss)
            module.balance_loss = None  # a kept one would keep the whole graph
    return torch.stack(losses).mean() if losses else None
