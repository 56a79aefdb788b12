"""Layers that stand alone: tensors in, tensors out, no trainer, no global state."""

from moe.layers.attention import GroupedQueryAttention
from moe.layers.experts import Experts
from moe.layers.feed_forward import FeedForward
from moe.layers.mla import MultiHeadLatentAttention
from moe.layers.moe import MoE
from moe.layers.router import Router

__all__ = ["Experts", "FeedForward", "GroupedQueryAttention", "MoE", "MultiHeadLatentAttention", "Router"]
