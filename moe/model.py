"""The transformer: embedding, decoder layers, norm, head; and its directory of config.json + safetensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import accounting
from moe.cache import Cache
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.generate import generate
from moe.layers.decoder import DecoderLayer, stretching_of
from moe.layers.norm import RMSNorm
from moe.layers.rope import rotary_tables
from moe.layers.router import take_balance_loss
from moe.rundir import write_json

__all__ = ["ModelOutput", "Transformer"]


@dataclass
class ModelOutput:
    """What a forward pass gives. `loss`: next-token cross-entropy, nats per valid token, or None without labels.

    `balance_loss`: what `moe.Balancer` asked the routers for in training, weighted; to add for the backward pass only.
    """

    logits: Tensor
    loss: Tensor | None = None
    balance_loss: Tensor | None = None


class Transformer(nn.Module):
    """A decoder-only language model described by a ModelConfig.

    >>> model = Transformer(config)
    >>> out = model(input_ids, labels=input_ids)   # labels as in Hugging Face: unshifted, -100 is ignored
    >>> out.loss.backward()
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Logits (B, S, vocab) for token ids (B, S); with labels also the loss.

        Args:
            labels: (B, S), the ids themselves with -100 where no loss is wanted; shifted here, so position s is scored
                against label s + 1.
            position_ids: (B, S) integers; None for 0 … S-1, or for those that follow the cached tokens.
            cache: earlier tokens of these sequences, to attend to; the new ones are added to it.
        """
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = cache.positions(length) if cache else torch.arange(length, device=input_ids.device)[None]
        mask = cache.mask(length) if cache else None
        rotary = rotary_tables(position_ids, self.config.rotary_dim, self.config.rope_theta, stretching_of(self.config))
        x_BSD = self.embed_tokens(input_ids)
        for number, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, rotary, mask, cache.layer(number) if cache else None)
        if cache:
            cache.advance(length)
        logits = self.lm_head(self.norm(x_BSD))
        loss = None if labels is None else _next_token_loss(logits, labels)
        return ModelOutput(logits, loss, take_balance_loss(self.layers) if self.training else None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        end_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Continue token-id prompts of any lengths over a compressed cache; see `moe.generate`."""
        weight = self.embed_tokens.weight
        training = self.training
        self.eval()
        try:
            return generate(
                self, prompts, max_new_tokens, temperature=temperature, end_token=end_token, generator=generator,
                device=weight.device, dtype=weight.dtype,
            )  # fmt: skip
        finally:
            self.train(training)

    def num_parameters(self, active: bool = False) -> int:
        """Parameters by `moe.accounting`: with `active=True` those one token passes, without the input embedding."""
        return accounting.num_parameters(self.config, active=active)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors. A tied matrix is stored once, under the embedding's name."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, directory / "model.safetensors")
        write_json(directory / "config.json", {"format": "frugal-moe", "model": self.config.to_dict()})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Transformer":
        """Load what `save_pretrained` wrote. Raises CheckpointError when the directory is not one of ours."""
        directory = Path(directory)
        model = cls(_read_config(directory))
        model.load_weights(directory)
        return model

    def load_weights(self, directory: str | Path) -> None:
        """Copy the weights of a `save_pretrained` directory into this model; every name and shape must agree."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = Path(directory) / "model.safetensors"
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}); give a directory written by save_pretrained"
            ) from None
        if self.config.tie_word_embeddings and "embed_tokens.weight" in state:
            state["lm_head.weight"] = state["embed_tokens.weight"]
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{file} is of another architecture: {str(error).splitlines()[-1].strip()}") from None

    def _initialise(self) -> None:
        """Normal matrices of one standard deviation (DeepSeek-V3 section 4.2), ones in norms, zero biases."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of position s against label s + 1, in fp32; the labels shift, so no logits are copied."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), ignore_index=-100)


def _read_config(directory: Path) -> ModelConfig:
    import json

    file = directory / "config.json"
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return ModelConfig.from_dict(stored["model"])
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); give a save_pretrained directory") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{file} is not one of ours; give a directory written by save_pretrained") from None
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
