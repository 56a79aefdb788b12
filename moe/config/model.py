"""A model's configuration, and the dense model it is compared with."""

from dataclasses import dataclass
from typing import Literal

from moe.config.architecture import Architecture
from moe.config.twin import dense_twin

__all__ = ["ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """A decoder-only transformer. `n_routed_experts=0` makes every layer dense.

    Raises ConfigError when a field is of the wrong type or out of range, or when fields contradict each other.
    """

    def dense_twin(self, match: Literal["active", "total"] = "active") -> "ModelConfig":
        """The dense model this one is compared with: same attention, vocabulary and token count, every layer dense.

        `match="active"`: same depth and hidden size; the SwiGLU width is the mean active width of the layers, rounded
        to 16. `match="total"`: depth and hidden size are scaled up until the total number of parameters is nearest.
        `moe.accounting.twin_residual(self, twin)` tells what rounding left.
        """
        return dense_twin(self, match)
