"""What the run needs of memory, what it took, and what to say when there is not enough."""

import os
import resource
import sys
from typing import Any

import torch

from moe import accounting
from moe.config import Recipe

__all__ = ["budget", "check", "explain", "is_out_of_memory", "peak_bytes", "report", "sentence"]


def budget(recipe: Recipe, micro_batch_size: int) -> dict[str, int]:
    """Bytes by part of one rank's training step, by `moe.accounting.memory`; they add up."""
    train = recipe.train
    return accounting.memory(
        recipe.model,
        micro_batch_size=micro_batch_size,
        seq_len=train.seq_len,
        precision=train.precision,
        recompute_layers=train.recompute_layers,
        optimizer=recipe.optim.name,
    )


def check(recipe: Recipe, micro_batch_size: int, device: torch.device, ranks: int) -> None:
    """Refuse what cannot fit, before it is made: a rank's share of the weights' tensors, or one micro-batch's.

    Raises ConfigError naming the fields to change.
    """
    there = total_bytes(device)
    parts = budget(recipe, micro_batch_size)
    activations = parts.pop("activations")
    if sum(parts.values()) / ranks > there:
        recipe.model.fail(
            "num_hidden_layers",
            f"and the model's other sizes need {_listed(parts)} for training, and there are {_size(there)}: make the "
            "model smaller, or train it on more ranks",
        )
    if activations > there:
        recipe.train.fail(
            "micro_batch_size",
            f"needs {_size(activations)} of activations for {micro_batch_size} sequences of {recipe.train.seq_len} "
            f"tokens, and there are {_size(there)}: lower it, or shorten train.seq_len, or raise "
            "train.recompute_layers",
        )


def total_bytes(device: torch.device) -> int:
    """Memory of the device; of the machine, for a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def report(recipe: Recipe, micro_batch_size: int, device: torch.device) -> dict[str, Any]:
    """What memory.json holds: bytes a rank was expected to need, by part, and the most this one held."""
    return {
        "device": device.type,
        "expected_bytes": budget(recipe, micro_batch_size),
        "peak_bytes": peak_bytes(device),
        "peak_of": "tensors" if device.type == "cuda" else "process",
    }


def sentence(parts: dict[str, int]) -> str:
    """The budget in words: total, then each part."""
    return f"{_size(sum(parts.values()))} of tensors expected at the peak: {_listed(parts)}"


def peak_bytes(device: torch.device) -> int:
    """The most this process held so far: tensors on a GPU, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU, in torch's CPU allocator or in Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def explain(recipe: Recipe, micro_batch_size: int, step: int, device: torch.device) -> str:
    """One sentence for a step that ran out of memory: the budget, and the fields that change it."""
    train = recipe.train
    parts = budget(recipe, micro_batch_size)
    there = f" on a device of {_size(total_bytes(device))}" if device.type == "cuda" else ""
    mends = []
    if micro_batch_size > 1:
        mends.append(f"lower train.micro_batch_size (now {micro_batch_size}; the global batch stays)")
    layers = recipe.model.num_hidden_layers + recipe.model.num_nextn_predict_layers
    if train.recompute_layers < layers:
        mends.append(f"raise train.recompute_layers (now {train.recompute_layers} of {layers})")
    mends.append(f"shorten train.seq_len (now {train.seq_len})")
    if train.precision == "fp32":
        mends.append("use train.precision=bf16")
    return f"out of memory at step {step}{there}, with {sentence(parts)}; {', or '.join(mends)}"


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in parts.items())


def _size(number: int) -> str:
    if number >= 1e12:
        return f"{number / 1e12:,.1f} TB"
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
