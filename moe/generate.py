"""Continue prompts token by token over a cache."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.cache import Cache
from moe.config import ModelConfig
from moe.errors import ConfigError

__all__ = ["generate"]


class LanguageModel(Protocol):
    """What `generate` needs of a model: its configuration, and a `ModelOutput` for ids over a cache."""

    config: ModelConfig

    def __call__(self, input_ids: Tensor, *, cache: Cache) -> Any: ...


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    end_token: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """The new tokens of each prompt, without the prompt; up to and including `end_token` where it comes.

    Args:
        prompts: token ids of each sequence; lengths may differ.
        temperature: 0 takes the likeliest token, ties the lowest id; else samples from softmax(logits / temperature).
        generator: source of randomness for sampling, on the model's device; None for torch's own.
        device, dtype: where the model is, and what its activations are.

    Raises ConfigError for no prompt, an empty prompt, or a negative temperature.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ConfigError(f"prompts={list(map(len, prompts))} tokens: give at least one, none of them empty")
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature} must be at least 0")
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = Cache(model.config, len(prompts), longest + max_new_tokens, padding=padding, device=device, dtype=dtype)
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        out = model(ids, cache=cache)
        logits = out.head(out.hidden[:, -1]).float()
        ids = _choose(logits, temperature, generator)[:, None]
        for row, token in enumerate(ids[:, 0].tolist()):
            if row in open_rows:
                new[row].append(token)
                if token == end_token:
                    open_rows.discard(row)
        if not open_rows:
            break
    return new


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token for each row of (B, vocabulary) logits."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
