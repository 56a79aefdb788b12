"""The decoding cache: for latent attention C + R numbers a token and layer, whatever the number of heads."""

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.layers.memory import Memory

__all__ = ["Cache"]


class Cache:
    """Room for `max_length` tokens of `batch_size` sequences, allocated once.

    Latent attention stores, per layer and token, the normalised latent (kv_lora_rank) and the rotated key all heads
    share (qk_rope_head_dim): DeepSeek-V3's 576 numbers against 40,960 for the keys and values they expand to.
    Grouped-query attention stores its keys and values.

    Prompts of different lengths are padded on the left: row b's first `padding[b]` tokens are never attended to, and
    its positions count from the first token after them.

    Raises ConfigError when more tokens come than there is room for.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        padding: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if config.attention == "mla":
            shape: tuple[int, ...] = (batch_size, max_length, config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            heads = config.num_key_value_heads or config.num_attention_heads
            shape = (2, batch_size, heads, max_length, config.qk_head_dim)
        self._store = torch.zeros((config.num_hidden_layers, *shape), device=device, dtype=dtype)
        self._padding = None if padding is None or not padding.any() else padding.to(self._store.device)
        self.max_length = max_length
        self.length = 0

    @property
    def elements_per_token(self) -> int:
        """Numbers stored for one token of one sequence, all layers."""
        batch = self._store.shape[-4] if self._store.dim() == 6 else self._store.shape[1]
        return self._store.numel() // (batch * self.max_length)

    def layer(self, number: int) -> Memory:
        """What decoder layer `number` writes to and reads."""
        return Memory(self._store[number], self.length)

    def positions(self, new: int) -> Tensor:
        """Positions of the next `new` tokens, (B or 1, new); padding counts as position 0."""
        if self.length + new > self.max_length:
            raise ConfigError(
                f"max_length={self.max_length} has no room for {new} tokens after {self.length}; make a longer Cache"
            )
        positions = torch.arange(self.length, self.length + new, device=self._store.device)[None]
        return positions if self._padding is None else (positions - self._padding[:, None]).clamp_min(0)

    def mask(self, new: int) -> Tensor | None:
        """Who may attend to whom, (B or 1, 1, new, length + new) bool; None where plain causality says it all.

        A padding token attends to itself alone: to nothing at all would be 0 / 0, which spreads.
        """
        if self._padding is None and (self.length == 0 or new == 1):
            return None
        queries = torch.arange(self.length, self.length + new, device=self._store.device)[:, None]
        keys = torch.arange(self.length + new, device=self._store.device)
        allowed = (keys <= queries)[None, None]
        if self._padding is not None:
            allowed = allowed & (keys >= self._padding[:, None, None, None]) | (keys == queries)
        return allowed

    def advance(self, new: int) -> None:
        """Count `new` tokens as stored, once every layer has written them."""
        self.length += new
