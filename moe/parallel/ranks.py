"""Who we are among the processes of a run, and sums over them.

Rank and world size come from torch.distributed itself: under DeepSpeed on CPU accelerate believes there is one
process while there are two.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_reduce_sum",
    "barrier",
    "gather_json",
    "gather_texts",
    "is_first",
    "local_rank",
    "node",
    "patient_barrier",
    "rank",
    "say",
    "sum_numbers",
    "world_size",
]


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _active() else 1


def local_rank() -> int:
    """This process's number on its host, as the launcher says; also right before torch.distributed starts."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node() -> int:
    """Number of this process's host, from 0, as the launcher says: torch's, or DeepSpeed's own for several hosts."""
    said = (os.environ.get(name) for name in ("GROUP_RANK", "CROSS_RANK", "NODE_RANK"))
    return int(next(filter(None, said), "0"))


def is_first() -> bool:
    """Whether this is rank 0, which alone writes the run directory's files."""
    return rank() == 0


def say(sentence: str) -> None:
    """Tell the user, on stderr; rank 0 does it for all."""
    if is_first():
        print(sentence, file=sys.stderr, flush=True)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks in place and return it; nothing happens with one process."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Each number summed over all ranks, in fp64; with one process no device is touched, so no GPU is waited for."""
    if world_size() == 1:
        return list(numbers)
    return all_reduce_sum(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def patient_barrier() -> Callable[[], None]:
    """A barrier to use once, which waits for up to a week; `barrier` itself ends a run in minutes. Every rank makes it.

    Both this and what it returns raise RuntimeError when a rank has left.
    """
    if world_size() == 1:
        return lambda: None
    barrier()  # all are here: making a group is deaf to signals and as patient as the group, so it must wait for nobody
    group = dist.new_group(backend="gloo", timeout=timedelta(weeks=1))

    def wait() -> None:  # by a sum on the CPU: a barrier of gloo's takes place on the device that NCCL is bound to
        dist.all_reduce(torch.zeros(1), group=group)

    return wait


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Every rank's `text` in rank order, as tensors: object collectives would pickle."""
    if world_size() == 1:
        return [text]
    raw = text.encode()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(raw)], device=device))
    longest = max(int(length) for length in lengths)
    mine = torch.frombuffer(bytearray(raw.ljust(max(1, longest), b"\0")), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return [bytes(part.tolist())[: int(length)].decode() for part, length in zip(everyone, lengths, strict=True)]


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """Every rank's JSON value in rank order."""
    return [json.loads(text) for text in gather_texts(json.dumps(value), device)]
