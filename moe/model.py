"""The transformer: embedding, decoder layers, norm, head; and its directory of config.json + safetensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe import accounting
from moe.cache import Cache
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.generate import generate
from moe.layers.decoder import DecoderLayer, stretching_of
from moe.layers.head import IGNORED, OutputHead, next_token_labels
from moe.layers.mtp import MultiTokenPredictor
from moe.layers.norm import RMSNorm
from moe.layers.rope import Rotary, rotary_tables
from moe.layers.router import take_balance_loss
from moe.rundir import write_json

__all__ = ["ModelOutput", "Transformer", "write_pretrained"]


@dataclass
class ModelOutput:
    """What a forward pass gives.

    hidden: (B, S, D), after the final norm. `logits` are made from it when asked for: a training step never needs them.
    head: the model's, which makes them.
    loss: next-token cross-entropy, nats per valid token, fp32; None without labels.
    balance_loss: what `moe.Balancer` asked the routers for in training, weighted; to add for the backward pass only.
    mtp_loss: mean of the multi-token prediction modules' cross-entropies, not weighted; in training with labels.
    """

    hidden: Tensor
    head: OutputHead
    loss: Tensor | None = None
    balance_loss: Tensor | None = None
    mtp_loss: Tensor | None = None

    @cached_property
    def logits(self) -> Tensor:
        """(B, S, vocab_size), in the dtype of the hidden states; made once."""
        return self.head(self.hidden)


class Transformer(nn.Module):
    """A decoder-only language model described by a ModelConfig.

    Parameters are made in torch's default dtype on its default device, and initialised as `config.initialization` says;
    `.to(dtype)` casts all but expert biases, which stay fp32. An ordinary module: `torch.compile(fullgraph=True)`
    takes it whole, `recompute` is its activation checkpointing, `moe.Balancer(model)` balances its experts.

    >>> model = Transformer(config)
    >>> out = model(input_ids, labels=input_ids)   # labels as in Hugging Face: unshifted, -100 is ignored
    >>> out.loss.backward()
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._recomputed = 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(config, depth + 1) for depth in range(config.num_nextn_predict_layers)
        )
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        document_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Hidden states and logits for token ids (B, S); with labels also the loss.

        Args:
            input_ids: (B, S) integers below `vocab_size`.
            labels: (B, S), the ids themselves with -100 where no loss is wanted; shifted here, so position s is scored
                against label s + 1.
            position_ids: (B, S) integers; None for 0 … S-1, or for those that follow the cached tokens.
            cache: earlier tokens of these sequences, to attend to; the new ones are added to it.
            document_ids: (B, S) integers, alike and side by side for the tokens of a document, which attend only to one
                another. -1 is padding, which is no load to balance; give it the label -100. Rotary positions are
                relative, so they need no restart.

        Raises:
            ConfigError: `cache` together with `document_ids`.
        """
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = cache.positions(length) if cache else torch.arange(length, device=input_ids.device)[None]
        if cache and document_ids is not None:
            raise ConfigError("document_ids are for whole sequences: leave them out when decoding over a cache")
        mask = cache.mask(length) if cache else _same_document(document_ids)
        counted_BS = None if document_ids is None else document_ids >= 0
        rotary = rotary_tables(position_ids, self.config.rotary_dim, self.config.rope_theta, stretching_of(self.config))
        x_BSD = self.embed_tokens(input_ids)
        for number, layer in enumerate(self.layers):
            memory = cache.layer(number) if cache else None
            x_BSD = self._run(number, layer, x_BSD, rotary, mask, memory, counted_BS)
        if cache:
            cache.advance(length)
        out = ModelOutput(self.norm(x_BSD), self.lm_head)
        if labels is not None:
            out.loss = self._loss(out.hidden, labels)
            if self.training and self.mtp:
                out.mtp_loss = self._mtp_loss(input_ids, out.hidden, labels, rotary, mask, document_ids)
        if self.training:
            out.balance_loss = take_balance_loss(self)
        return out

    def recompute(self, layers: int) -> None:
        """From now on, this many layers keep only input and routing decisions for the backward pass, of the first ones.

        The rest is computed again there. Multi-token prediction modules come after the layers. For torch.compile this
        sets `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`, for the whole process.

        Raises ConfigError for more layers than there are.
        """
        if not 0 <= layers <= len(self.layers) + len(self.mtp):
            raise ConfigError(f"layers={layers} must be between 0 and {len(self.layers) + len(self.mtp)}, the model's")
        self._recomputed = layers
        # torch.compile refuses a checkpointed region that sets attributes, which a repetition would set again; routers
        # record their load in the first pass alone, and that is what this setting makes of it
        if layers and hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True

    def _run(self, number: int, layer: nn.Module, *inputs: Any) -> Tensor:
        """A layer, whose activations are kept or not. Routing is kept: repeated, near ties might fall otherwise."""
        if number < self._recomputed and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_routes)
        return layer(*inputs)

    def _loss(self, hidden_BSD: Tensor, labels: Tensor, lost: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of position s against label s + 1 over the labelled ones, where those `lost` count 0."""
        shifted = next_token_labels(labels)
        count = (shifted != IGNORED).sum().clamp_min(1)  # a micro-batch without labels adds nothing
        if lost is not None:
            shifted = shifted.masked_fill(lost, IGNORED)
        return self.lm_head(hidden_BSD, shifted) / count

    def _mtp_loss(
        self,
        input_ids: Tensor,
        hidden_BSD: Tensor,
        labels: Tensor,
        rotary: Rotary,
        mask: Tensor | None,
        document_ids: Tensor | None,
    ) -> Tensor:
        """Mean over modules. Of a sequence's last tokens, and a document's, nothing further ahead is known.

        Positions whose further tokens lie in another document count as 0 among the labelled: so micro-batches weigh the
        same wherever documents end. They come last in their document and none that is scored attends to them.
        """
        losses = []
        for number, module in enumerate(self.mtp):
            ahead = number + 1
            known = input_ids.shape[1] - ahead
            lost = counted_BS = None
            if document_ids is not None:
                lost = document_ids[:, :known] != document_ids[:, ahead:]
                counted_BS = (document_ids[:, :known] >= 0) & ~lost
            hidden_BSD = self._run(
                len(self.layers) + number,
                module,
                self.embed_tokens(input_ids[:, ahead:]),
                hidden_BSD[:, :known],
                tuple(table[:, :known] for table in rotary),
                None if mask is None else mask[:, :, :known, :known],
                counted_BS,
            )
            losses.append(self._loss(hidden_BSD, labels[:, ahead:], lost))
        return torch.stack(losses).mean()

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
        """Write config.json and model.safetensors, which `from_pretrained` reads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_pretrained(directory, self.config, self.stored_weights())

    def stored_weights(self) -> dict[str, Tensor]:
        """What model.safetensors holds, by name. A tied matrix is stored once, under the embedding's name."""
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        return state

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
        """Normal matrices, ones in norms, zero biases; see `initialization` in the configuration."""
        config = self.config
        for name, parameter in self.named_parameters():
            to_residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
            if parameter.dim() >= 2:
                scale = (2 * config.num_hidden_layers) ** -0.5
                scaled = config.initialization == "scaled" and to_residual
                nn.init.normal_(parameter, std=config.initializer_range * (scale if scaled else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def write_pretrained(directory: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """The two files of `save_pretrained` from tensors named as `stored_weights` names them."""
    from safetensors.torch import save_file

    save_file(weights, directory / "model.safetensors")
    write_json(directory / "config.json", {"format": "frugal-moe", "model": config.to_dict()})


# What a recomputed layer keeps besides its input: the chosen experts, their weights and scores, a few numbers a token.
_keeping_routes = partial(create_selective_checkpoint_contexts, [torch.ops.moe_kernels.topk_route.default])


def _same_document(document_ids: Tensor | None) -> Tensor | None:
    """Who may attend to whom, (B, 1, S, S) bool: earlier tokens of the same document, and itself."""
    if document_ids is None:
        return None
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


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
