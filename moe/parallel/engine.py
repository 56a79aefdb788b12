"""What accelerate does for the trainer: the device, the processes, and the wrapped model.

accelerate starts the processes; whether they really train together is checked here, because on a machine without a GPU
it starts several processes that each believe they are alone, without a word.
"""

import os
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
from moe.errors import ConfigError
from moe.model import Transformer
from moe.parallel import ranks

__all__ = ["Engine"]


class Engine:
    """One process's part of the run: `device`, `ranks` (how many train together), and model wrapping.

    Raises ConfigError when accelerate's mixed precision contradicts `train.precision`, or when the launch asked for an
    engine or a number of processes that is not what runs.
    """

    def __init__(self, train: TrainConfig) -> None:
        _check_precision(train)
        _check_engine()
        # loads are counted per rank between steps, so no rank's buffers may overwrite another's
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # autocast is the loop's own: accelerate's would also copy every logit to fp32
        self._accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp])
        _check_processes(self._accelerator)
        self._precision = train.precision
        self.device: torch.device = self._accelerator.device
        self.ranks = ranks.world_size()

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model wrapped for several ranks; call it for the forward pass."""
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; the name it offers instead is not known to torch 2.11
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            return self._accelerator.prepare_model(model)

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in the dtype of `train.precision`."""
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients travel between ranks after the last one only."""
        return nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, objective: Tensor) -> None:
        """Add the gradient of a micro-batch's objective, already divided by the number of micro-batches."""
        objective.backward()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradient of the global batch to at most `max_norm`; return its norm before."""
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

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
        """Put a checkpoint into model, optimizer and random generators; return its stored state."""
        return load_checkpoint(checkpoint, model, optimizer)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, without waiting on a GPU."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def release(self) -> None:
        """Forget the prepared model, so that another can take its place in memory."""
        self._accelerator.free_memory()

    def close(self) -> None:
        """Leave the process group, so that no rank warns about it at exit."""
        self._accelerator.end_training()


def _check_precision(train: TrainConfig) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", train.precision):
        train.fail(
            "precision", f"contradicts accelerate's --mixed_precision {asked}; drop that flag, train.precision decides"
        )


def _check_engine() -> None:
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "false").lower() == "true":
            raise ConfigError(
                f"the launch asks for {name} ({variable}=true), which is not supported yet; launch without it"
            )


def _check_processes(accelerator: Accelerator) -> None:
    """Without a GPU, `accelerate launch --multi_gpu` makes a process group that accelerate then does not use."""
    asked = max(int(os.environ.get("WORLD_SIZE", "1")), ranks.world_size())
    if asked != accelerator.num_processes:
        raise ConfigError(
            f"the launch started {asked} processes but accelerate trains each of them alone: it saw no GPU; "
            "on a CPU machine set ACCELERATE_USE_CPU=true in front of accelerate launch --multi_gpu"
        )
