"""Decode one token over a long cache: our latent cache, absorbed, against Hugging Face's DeepSeek-V2 attention.

One attention layer of DeepSeek-V2-Lite's shape (hidden 2048, 16 heads, latent 512), fp32, batch 1, the same weights on
both sides. Outputs must agree before anything is timed; then single tokens are decoded in turn, ours and theirs, each
over its own cache. The floor is the time to read the layer's weights and its latents once at the copy bandwidth
measured in the same process.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moe.layers import MultiHeadLatentAttention
from moe.layers.memory import Memory
from moe.layers.rope import rotary_tables

SHAPE = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
HIDDEN, HEADS, THETA = 2048, 16, 10000.0
CASES = {"4k": 4096, "16k": 16384}
ROUNDS = 7


class Theirs:
    """Hugging Face's attention with its own growing cache."""

    def __init__(self, ours: MultiHeadLatentAttention) -> None:
        from transformers import DeepseekV2Config
        from transformers.cache_utils import DynamicCache
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

        config = DeepseekV2Config(
            hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=None, **SHAPE,
            num_hidden_layers=1, max_position_embeddings=32768, attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.layer = DeepseekV2Attention(config, layer_idx=0).eval()
        self.layer.load_state_dict(ours.state_dict())
        self.rotary = DeepseekV2RotaryEmbedding(config)
        self.cache = DynamicCache()
        self.length = 0

    def step(self, x: Tensor) -> Tensor:
        new = x.shape[1]
        positions = torch.arange(self.length, self.length + new)[None]
        self.length += new
        mask = None
        if new > 1:  # sdpa is causal by itself only from the first token on
            mask = torch.ones(new, self.length, dtype=torch.bool).tril(self.length - new)[None, None]
        return self.layer(
            hidden_states=x, position_embeddings=self.rotary(x, positions), attention_mask=mask,
            past_key_values=self.cache,
        )[0]  # fmt: skip


class Ours:
    """The same layer over a latent store allocated once."""

    def __init__(self, layer: MultiHeadLatentAttention, room: int) -> None:
        self.layer = layer
        self.store = torch.zeros(1, room, SHAPE["kv_lora_rank"] + SHAPE["qk_rope_head_dim"])
        self.length = 0

    def step(self, x: Tensor) -> Tensor:
        new = x.shape[1]
        positions = torch.arange(self.length, self.length + new)[None]
        memory = Memory(self.store, self.length)
        mask = None
        if new > 1 and self.length:
            mask = torch.ones(new, self.length + new, dtype=torch.bool).tril(self.length)[None, None]
        self.length += new
        return self.layer(x, rotary_tables(positions, self.layer.rotary_dim, THETA), mask, memory)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copy_bandwidth() -> float:
    """Bytes read plus bytes written per second by a copy of 256 MiB."""
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() * 4 / best


@torch.inference_mode()
def run(case: str, cached: int, bandwidth: float) -> dict[str, object]:
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(HIDDEN, HEADS, **SHAPE, rope_theta=THETA).eval()
    ours, theirs = Ours(layer, cached + ROUNDS + 2), Theirs(layer)
    for piece in torch.randn(1, cached, HIDDEN).split(1024, dim=1):
        ours.step(piece)
        theirs.step(piece)
    token = torch.randn(1, 1, HIDDEN)
    mine, other = ours.step(token), theirs.step(token)
    error = float((mine - other).norm() / other.norm())
    if not error < 1e-4:
        raise SystemExit(f"bench decode {case}: outputs differ by {error:.2e}; nothing is timed")
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(ROUNDS):
        token = torch.randn(1, 1, HIDDEN)
        times["ours"].append(seconds(partial(ours.step, token)))
        times["theirs"].append(seconds(partial(theirs.step, token)))
    mine_s, theirs_s = statistics.median(times["ours"][1:]), statistics.median(times["theirs"][1:])
    weights = sum(parameter.numel() for parameter in layer.parameters())
    floor_s = 4 * (weights + ours.store[:, : ours.length].numel()) / bandwidth
    return {
        "bench": "decode",
        "case": case,
        "ours": mine_s * 1e3,
        "peer": theirs_s * 1e3,
        "peer_name": "transformers DeepseekV2Attention, sdpa, DynamicCache",
        "unit": "ms per token",
        "ratio": theirs_s / mine_s,
        "floor_fraction": floor_s / mine_s,
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "config": {
            **SHAPE, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "batch": 1, "cached_tokens": cached,
            "dtype": "fp32", "relative_error": error, "rounds": ROUNDS - 1, "torch": torch.__version__,
            "cache_bytes_per_token": {"ours": 4 * 576, "peer": 4 * HEADS * (128 + 64 + 128)},
        },
    }  # fmt: skip


def main() -> None:
    bandwidth = copy_bandwidth()
    for case, cached in CASES.items():
        print(json.dumps(run(case, cached, bandwidth)), flush=True)


if __name__ == "__main__":
    main()
