"""Launching and compiling ahead, by Triton itself on a driver that only takes notes: no GPU is needed to compile."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_kernels import launching
from moe_kernels._triton import HAVE_TRITON, INTERPRETED

if not HAVE_TRITON or INTERPRETED:
    pytest.skip("runs on Linux in the process of scripts/test that compiles: pytest -m aot", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime._allocation import _allocator

from moe_kernels.launching import compile_ahead, launch

pytestmark = pytest.mark.aot


def fill(p_x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(p_x + tl.arange(0, BLOCK), 1.0)


def wrong(p_x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(p_x + nowhere, 1.0)  # noqa: F821


class OnGpu:
    """What kernels are told of a tensor on the second GPU."""

    dtype, device, is_cuda = torch.float32, torch.device("cuda", 1), True

    def data_ptr(self) -> int:
        return 512


class Driver:
    """Triton's driver of an H100 that is not there."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], Any]] = []  # grid, who gives memory
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: self.launched.append((args[:3], _allocator.get()))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Driver:
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launching, "_threads", lambda: 2)
    return made


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices made current, in order."""
    devices: list[torch.device] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        devices.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    return devices


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that compiled, one entry a kernel; each waits for another to have begun."""
    threads: list[threading.Thread] = []
    both, right = threading.Barrier(2, timeout=30), triton.compiler.compile

    def compile(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        both.wait()
        return right(*args, **options)

    monkeypatch.setattr(triton.compiler, "compile", compile)
    return threads


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns in a thread of its own, whose context is empty as autograd's are."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(30)
    return found[0]


def test_a_launch_has_memory_in_any_thread(driver: Driver, entered: list[torch.device]) -> None:
    """Triton finds our allocator while it launches, and nothing is left of it; the tensors' device is the current."""
    kernel = triton.jit(fill)

    def work() -> Any:
        before = _allocator.get()
        launch(kernel, (3,), OnGpu(), BLOCK=16)
        return before is _allocator.get()

    assert in_a_thread(work)
    assert driver.launched == [((3, 1, 1), launching._allocate)]
    assert entered == [OnGpu.device]


def test_a_callers_allocator_is_left_alone(driver: Driver) -> None:
    """Who launches kernels of their own keeps the memory that they asked for, and ours do not take of it."""

    def theirs(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError("asked")

    def work() -> Any:
        triton.set_allocator(theirs)
        launch(triton.jit(fill), (3,), OnGpu(), BLOCK=16)
        return _allocator.get()

    assert in_a_thread(work) is theirs
    assert driver.launched == [((3, 1, 1), launching._allocate)]


def test_compiles_several_at_once_and_launches_none(driver: Driver, compilations: list[threading.Thread]) -> None:
    """Each waits for the other to have begun; both are done when the block ends, and are not compiled again."""
    kernel = triton.jit(fill)
    with compile_ahead():
        launch(kernel, (1,), OnGpu(), BLOCK=16)
        launch(kernel, (2,), OnGpu(), BLOCK=64)
    assert len({*compilations} - {threading.main_thread()}) == 2
    assert driver.launched == []
    launch(kernel, (2,), OnGpu(), BLOCK=64)
    assert len(compilations) == 2
    assert [grid for grid, _ in driver.launched] == [(2, 1, 1)]


def test_equal_kernels_are_compiled_once(driver: Driver, compilations: list[threading.Thread]) -> None:
    """A probe launches the same kernel in several of its problems."""
    kernel = triton.jit(fill)
    with compile_ahead():
        for block in (16, 16, 64, 64, 16):
            launch(kernel, (1,), OnGpu(), BLOCK=block)
    assert len(compilations) == 2


def test_one_thread_makes_the_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton makes it at the first use without a lock: threads that came to it together would each run a C compiler."""
    makers: list[threading.Thread] = []

    def create() -> Driver:
        makers.append(threading.current_thread())
        time.sleep(0.05)
        return driver

    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "_create_driver", create)
    for name in ("_active", "_default"):
        monkeypatch.setattr(triton.runtime.driver, name, None)
    kernel = triton.jit(fill)
    with compile_ahead():
        for block in (16, 64):
            launch(kernel, (1,), OnGpu(), BLOCK=block)
    assert makers == [threading.current_thread()]


def test_other_threads_launch_meanwhile(driver: Driver) -> None:
    """A training thread whose ops were checked before must not lose a kernel."""
    kernel = triton.jit(fill)
    with compile_ahead():
        in_a_thread(lambda: launch(kernel, (3,), OnGpu(), BLOCK=16))
        assert [grid for grid, _ in driver.launched] == [(3, 1, 1)]
        launch(kernel, (4,), OnGpu(), BLOCK=16)
    launch(kernel, (5,), OnGpu(), BLOCK=16)
    assert [grid for grid, _ in driver.launched] == [(3, 1, 1), (5, 1, 1)]


def test_what_the_compiler_raises_is_raised(driver: Driver) -> None:
    """A kernel that does not compile is told of when the block ends, and nothing is compiled ahead afterwards."""
    kernel = triton.jit(fill)
    with pytest.raises(triton.CompilationError, match="nowhere"), compile_ahead():
        launch(triton.jit(wrong), (1,), OnGpu(), BLOCK=16)
    launch(kernel, (1,), OnGpu(), BLOCK=16)
    assert [grid for grid, _ in driver.launched] == [(1, 1, 1)]
