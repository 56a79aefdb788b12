"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437 section 2.2): one further token ahead per module.

    h'_i = W [norm_e(Emb(t_{i+k})); norm_h(h_i^{k-1})]           k = 1 … depth
    h^k  = norm(layer(h'))                                       scored against t_{i+k+1} by the model's own head

The embedding comes first in W's input, as in the released checkpoints (the paper writes it second). h^0 is the model's
hidden state after its final norm, and h^k that after the module's, as vLLM and SGLang feed the released modules; the
paper does not say on which side of the norm it is meant. Embedding and head are the model's own.
"""

import torch
from torch import Tensor, nn

from moe.config.architecture import Architecture
from moe.layers.decoder import DecoderLayer
from moe.layers.norm import RMSNorm
from moe.layers.rope import Rotary

__all__ = ["MultiTokenPredictor"]


class MultiTokenPredictor(nn.Module):
    """Module number `depth` (from 1) of a configuration's `num_nextn_predict_layers`."""

    def __init__(self, config: Architecture, depth: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.depth = depth
        self.enorm = RMSNorm(hidden, eps=eps)
        self.hnorm = RMSNorm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = DecoderLayer(config, config.num_hidden_layers + depth - 1)
        self.norm = RMSNorm(hidden, eps=eps)

    def forward(
        self,
        embedded_BSD: Tensor,
        hidden_BSD: Tensor,
        rotary: Rotary,
        mask: Tensor | None = None,
        counted_BS: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of this depth (B, S, D) from those of the depth before, at the same positions.

        Args:
            embedded_BSD: embeddings of the tokens `depth` positions later.
            rotary, mask, counted_BS: as for `DecoderLayer`.
        """
        both = torch.cat((self.enorm(embedded_BSD), self.hnorm(hidden_BSD)), dim=-1)
        # under autocast the product is bf16; the residual stream that starts here is as wide as the model's
        stream_BSD = self.eh_proj(both).to(embedded_BSD.dtype)
        return self.norm(self.layer(stream_BSD, rotary, mask, counted_BS=counted_BS))
