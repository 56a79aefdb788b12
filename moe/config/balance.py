"""How expert load is kept even."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.config.fields import Section, setting

__all__ = ["BalanceConfig"]


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Section):
    """Load balancing. The method never changes the forward pass: only the expert biases between optimizer steps."""

    section_name: ClassVar[str] = "balance"

    method: Literal["sign", "none"] = setting(
        "sign",
        doc="sign: move each expert's bias one step against its load (DeepSeek-V3); none: leave biases at 0",
    )
    bias_update_speed: float = setting(
        1e-3,
        above=0,
        doc="size of one bias step; DeepSeek-V3 uses 0.001, a run of some hundred steps needs about 0.01",
    )
