"""Compiling ahead: several kernels at once, and only in the thread that asked for it."""

import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_kernels.launching import compile_ahead, launch

ON_GPU = SimpleNamespace(is_cuda=True, device="cuda:0")


class Kernel:
    """Stands for a kernel on a GPU that is not there."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[int, ...]] = []
        self.both = threading.Barrier(2, timeout=30)

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.both.wait()  # for another compilation
        self.compiled.append((grid, *args[1:], options))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launched.append(grid)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return Kernel()


def test_compiles_several_at_once_and_launches_none(kernel: Kernel) -> None:
    """Each waits for the other to have begun; both are done when the block ends."""
    with compile_ahead():
        launch(kernel, (1,), ON_GPU, 7, BM=16)
        launch(kernel, (2,), ON_GPU, 8, BM=64)
    assert sorted(kernel.compiled) == [((1,), 7, {"BM": 16}), ((2,), 8, {"BM": 64})]
    assert kernel.launched == []


def test_other_threads_launch_meanwhile(kernel: Kernel) -> None:
    """A training thread whose ops were checked before must not lose a kernel."""
    cpu = SimpleNamespace(is_cuda=False)
    with compile_ahead():
        thread = threading.Thread(target=launch, args=(kernel, (3,), cpu))
        thread.start()
        thread.join()
    launch(kernel, (4,), cpu)
    assert kernel.launched == [(3,), (4,)]


def test_what_the_compiler_raises_is_raised(kernel: Kernel) -> None:
    """A kernel that does not compile is told of at once."""
    kernel.both.abort()
    with pytest.raises(threading.BrokenBarrierError), compile_ahead():
        launch(kernel, (1,), ON_GPU)
