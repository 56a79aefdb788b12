"""What accelerate does for the trainer: the device, the processes, and the wrapped model.

accelerate starts the processes; whether they really train together is checked here, because on a machine without a GPU
it starts several processes that each believe they are alone, without a word.
"""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from moe.config import TrainConfig
from moe.errors import ConfigError
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
        """The model wrapped for several ranks."""
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

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, without waiting on a GPU."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

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
