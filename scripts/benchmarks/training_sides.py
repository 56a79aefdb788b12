"""One training step on two sides: ours and transformers' DeepSeek-V3, alike in everything but the layers.

Both start from the same weights and take forward, loss, backward, gradient clipping, fused AdamW over the same groups,
and zero_grad, on the same attention of torch (sdpa) and uncompiled; ours also moves the expert biases, and its process
keeps freed memory as our trainer's does. Precisions: fp32; bf16, autocast over fp32 weights; pure bf16, weights and
optimizer states too.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext

import torch
from step_parts import train_layer
from torch import Tensor, nn

from moe import Balancer, ModelConfig, Transformer, hf
from moe.config import OptimConfig
from moe.layers.head import next_token_labels
from moe.optim import build_optimizer
from moe.trainer.host_memory import keep_freed

__all__ = ["Ours", "Side", "Theirs", "batch_of", "build_feed_forward", "build_ours", "build_theirs"]

OPTIM = OptimConfig()


class Side(ABC):
    """A model and its optimizer; `step` trains it on one batch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> None:
        self.model = model.train()
        self.optimizer = optimizer
        self.precision = precision

    def step(self, ids: Tensor) -> float:
        """One optimizer step over `ids` (B, S); gives the loss, nats per token."""
        with torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext():
            loss = self.loss(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balance()
        return float(loss.detach())

    @abstractmethod
    def loss(self, ids: Tensor) -> Tensor:
        """Mean next-token cross-entropy."""

    @abstractmethod
    def balance(self) -> None:
        """What is done about the experts' load after a step."""


class Ours(Side):
    """A Transformer, dense or not, with its balancer."""

    def __init__(self, config: ModelConfig, precision: str) -> None:
        torch.manual_seed(0)
        model = Transformer(config)
        super().__init__(model, build_optimizer(model, OPTIM), precision)
        self.balancer = Balancer(model, method="sign" if config.is_moe else "none")

    def loss(self, ids: Tensor) -> Tensor:
        """Our head and loss."""
        return self.model(ids, labels=ids).loss

    def balance(self) -> None:
        """Expert biases follow the load."""
        self.balancer.step()


class Theirs(Side):
    """transformers' DeepseekV3ForCausalLM with the weights of `ours`.

    experts: transformers' name of a way to compute them.
    same_head: hidden states go into our head and loss, so that both sides have the same; else transformers' own, which
    keeps every logit in fp32.
    """

    def __init__(self, ours: Ours, precision: str, experts: str, *, same_head: bool) -> None:
        from transformers import AutoModelForCausalLM

        assert isinstance(ours.model, Transformer)
        with tempfile.TemporaryDirectory() as folder:
            hf.save(ours.model, folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16 if precision == "pure bf16" else torch.float32,
                attn_implementation="sdpa", experts_implementation=experts,
            )  # fmt: skip
        super().__init__(model, _same_groups(model), precision)
        self.head = type(ours.model.lm_head)(1, 1) if same_head else None
        if self.head is not None:
            self.head.weight = model.lm_head.weight

    def loss(self, ids: Tensor) -> Tensor:
        """Of our head or theirs."""
        if self.head is None:
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return self.head(hidden, next_token_labels(ids)) / ids[:, 1:].numel()

    def balance(self) -> None:
        """Nothing: transformers moves no biases."""


def batch_of(config: ModelConfig, shape: tuple[int, int], seed: int) -> Tensor:
    """Token ids (B, S), the same for every side."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def build_ours(config: ModelConfig, shape: tuple[int, int], precision: str) -> Callable[[int], float]:
    """Our side's step over the batch of a seed."""
    keep_freed()
    side = Ours(config, precision)
    return lambda seed: side.step(batch_of(config, shape, seed))


def build_theirs(
    config: ModelConfig, shape: tuple[int, int], precision: str, experts: str, same_head: bool, same_malloc: bool
) -> Callable[[int], float]:
    """The same of transformers' side. same_malloc: it keeps freed memory too, which transformers' Trainer does not."""
    if same_malloc:
        keep_freed()
    side = Theirs(Ours(config, "fp32"), precision, experts, same_head=same_head)
    return lambda seed: side.step(batch_of(config, shape, seed))


def build_feed_forward(config: ModelConfig, shape: tuple[int, int], precision: str) -> Callable[[int], object]:
    """Forward and backward of our last layer's feed-forward, a mixture with its shared experts or dense."""
    keep_freed()
    torch.manual_seed(0)
    layer = Transformer(config).train().layers[-1].mlp

    def work(seed: int) -> object:
        x = torch.randn(*shape, config.hidden_size, generator=torch.Generator().manual_seed(seed))
        return train_layer(layer, x, precision == "bf16")()

    return work


def _same_groups(model: nn.Module) -> torch.optim.AdamW:
    """The groups of `moe.optim.build_optimizer` by transformers' names: its routers are called gate."""
    plain = ("embed_tokens.weight", "mlp.gate.weight")
    kept = [p for name, p in model.named_parameters() if p.dim() < 2 or name.endswith(plain)]
    decayed = [p for name, p in model.named_parameters() if not (p.dim() < 2 or name.endswith(plain))]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, fused=True,
    )  # fmt: skip
