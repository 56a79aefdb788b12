"""What trains the model: the device, the processes, the wrapped model; here for one process, or several under DDP.

`moe.parallel.launch` chooses the engine; `moe.parallel.zero` is the other. What the trainer does with an engine is the
same for all, and so are checkpoints: a run may stop under one engine and go on under another.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from moe.checkpoint import Snapshot, capture, load_checkpoint
from moe.config import TrainConfig
from moe.model import Transformer
from moe.parallel import ranks
from moe.parallel.clipping import scale, sum_of_squares

__all__ = ["Engine"]


class Engine:
    """One process's part of the run: `device`, `ranks` (how many train together), and what it does to the model.

    `name` is what environment.json calls it. Made by hand it takes what accelerate has; `start_engine` checks that.
    """

    name = "one process"

    def __init__(self, train: TrainConfig) -> None:
        # loads are counted per rank between steps, so no rank's buffers may overwrite another's
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # autocast is the loop's own: accelerate's would also copy every logit to fp32
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp])
        self._precision = train.precision
        self.device: torch.device = self.accelerator.device
        self.ranks = ranks.world_size()
        if self.ranks > 1:
            self.name = "ddp"

    def prepare(self, model: Transformer, optimizer: torch.optim.Optimizer) -> nn.Module:
        """The model as the engine has it, to call for the forward pass of training; the optimizer is tied to it."""
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; the name it offers instead is not known to torch 2.11
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            return self.accelerator.prepare_model(model)

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in the dtype of `train.precision`; around those that are fp8, bf16."""
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Around forward passes of the model itself, without gradients. Every rank must make as many."""
        return torch.inference_mode()

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients travel between ranks after the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, objective: Tensor) -> None:
        """Add the gradient of a micro-batch's objective, already divided by the number of micro-batches."""
        objective.backward()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradient of the global batch to at most `max_norm`; return its norm before."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = sum_of_squares(gradients).sqrt().float()
        scale(gradients, norm, max_norm)
        return norm

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizer and forget the gradients."""
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def drop(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients without a step."""
        optimizer.zero_grad(set_to_none=True)

    def capture(
        self, model: Transformer, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, copy: bool
    ) -> Snapshot | None:
        """The run as it is now, on the rank that writes checkpoints; None on others. Every rank must call it."""
        return capture(model, optimizer, state, copy=copy) if ranks.is_first() else None

    def load(self, checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put a checkpoint into model, optimizer and random generators; return its stored state. Before `prepare`."""
        return load_checkpoint(checkpoint, model, optimizer)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, without waiting on a GPU."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def release(self) -> None:
        """Forget the prepared model, so that another can take its place in memory."""
        self.accelerator.free_memory()

    def close(self) -> None:
        """Leave the process group, so that no rank warns about it at exit."""
        self.accelerator.end_training()
