"""The SwiGLU feed-forward (Shazeer, arXiv:2002.05202): dense layers and shared experts."""

import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers.precision import as_multiplied

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), without biases (eq. 6 of the paper).

    Args:
        hidden_size: width D of input and output.
        intermediate_size: width between.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden_size) to the same shape, in the weights' dtype or autocast's."""
        x = as_multiplied(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
