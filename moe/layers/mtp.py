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
    """Module number `depth` of a configuration's `num_nextn_predict_layers` (eqs 21-25 of the paper).

    Args:
        config: a `moe.ModelConfig`; what is wrong in it raised ConfigError when it was made.
        depth: how many tokens further ahead than the next one, from 1.
    """

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
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        counted_BS: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of this depth (B, S, D), behind the norm, from those of the depth before at the same positions.

        They are scored by the model's own `OutputHead` against the tokens `depth` + 1 positions later.

        Args:
            embedded_BSD: embeddings of the tokens `depth` positions later.
            hidden_BSD: of the depth before; for depth 1 the model's, behind its final norm.
            rotary, mask, counted_BS: as for `DecoderLayer`.
        """
        both = torch.cat((self.enorm(embedded_BSD), self.hnorm(hidden_BSD)), dim=-1)
        # under autocast the product is bf16; the residual stream that starts here is as wide as the model's
        stream_BSD = self.eh_proj(both).to(embedded_BSD.dtype)
        return self.norm(self.layer(stream_BSD, rotary, mask, counted_BS=counted_BS))
