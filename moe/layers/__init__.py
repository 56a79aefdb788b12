"""Layers that stand alone: tensors in, tensors out, no trainer, no global state.

They work in a plain torch loop, in `nn.Sequential`, under `torch.compile(fullgraph=True)`, under activation
checkpointing and under autocast. Letters in names are dimensions: B batch, S sequence, T tokens, D hidden size, E
experts, K experts a token, F width of an expert.
"""

from moe.layers.attention import GroupedQueryAttention
from moe.layers.decoder import DecoderLayer
from moe.layers.experts import Experts
from moe.layers.feed_forward import FeedForward
from moe.layers.head import OutputHead
from moe.layers.mla import MultiHeadLatentAttention
from moe.layers.moe import MoE
from moe.layers.mtp import MultiTokenPredictor
from moe.layers.norm import RMSNorm
from moe.layers.router import Router

__all__ = [
    "DecoderLayer",
    "Experts",
    "FeedForward",
    "GroupedQueryAttention",
    "MoE",
    "MultiHeadLatentAttention",
    "MultiTokenPredictor",
    "OutputHead",
    "RMSNorm",
    "Router",
]
