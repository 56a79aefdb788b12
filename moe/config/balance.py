"""How expert load is kept even."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.config.fields import Section, setting

__all__ = ["BalanceConfig"]


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Section):
    """Load balancing. The method never changes what the forward pass computes: it moves expert biases between
    optimizer steps, or adds losses for the backward pass."""

    section_name: ClassVar[str] = "balance"

    method: Literal["sign", "quantile", "aux_loss", "none"] = setting(
        "sign",
        doc="sign: move each expert's bias one step against its load (DeepSeek-V3); quantile: set biases to the "
        "quantile that would have balanced the last batch; aux_loss: leave biases, add a loss; none: leave all alone",
    )
    bias_update_speed: float = setting(
        1e-3,
        above=0,
        doc="size of one bias step; DeepSeek-V3 uses 0.001, a run of some hundred steps needs a few times that",
    )
    centre: bool = setting(False, doc="sign: subtract the mean of the update over experts, so that biases do not drift")
    quantile_step: float = setting(
        1.0,
        above=0,
        at_most=1,
        doc="quantile: share of the way to the last batch's quantile that biases go a step; 1 takes it as it is, less "
        "averages over batches",
    )
    aux_loss_alpha: float = setting(
        0.0, at_least=0, doc="weight of the load-balancing loss of a micro-batch; 0.01 in Switch Transformers"
    )
    sequence_loss_alpha: float = setting(
        0.0, at_least=0, doc="weight of the balance loss within each sequence; DeepSeek-V3 uses 0.0001"
    )
    z_loss_alpha: float = setting(
        0.0, at_least=0, doc="weight of the squared logsumexp of router logits; 0.001 in ST-MoE"
    )

    @property
    def moves_biases(self) -> bool:
        """Whether the method needs routers with an expert bias."""
        return self.method in ("sign", "quantile")

    @property
    def has_losses(self) -> bool:
        """Whether anything is added to the loss for the backward pass."""
        return max(self.aux_loss_alpha, self.sequence_loss_alpha, self.z_loss_alpha) > 0

    def check_contradictions(self) -> None:
        """Raise ConfigError when the fields contradict each other."""
        if self.method == "aux_loss" and self.aux_loss_alpha == 0:
            self.fail("method", "needs balance.aux_loss_alpha above 0; try 0.01")
        if self.method == "none" and self.aux_loss_alpha > 0:
            self.fail("aux_loss_alpha", "contradicts balance.method=none; use method=aux_loss, or 0")
        if self.centre and self.method != "sign":
            self.fail("centre", f"is for balance.method=sign, not {self.method}; use false")

    def check_router(self, n_group: int, top_k: int, n_experts: int) -> None:
        """Raise ConfigError when the method cannot balance such a router.

        Quantile balancing needs the score of the first expert a token leaves out, so K < E; and with groups a token's
        cut-off is not the (K+1)-th score of all, so the rule stalls short of balance.
        """
        if self.method == "quantile" and n_group > 1:
            self.fail("method", f"stalls when experts are in groups (n_group={n_group}); use sign, or n_group=1")
        if self.method == "quantile" and top_k == n_experts:
            self.fail("method", f"is undefined when every token takes all {n_experts} experts; use none")
