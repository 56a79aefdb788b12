"""What the kernels' launchers would launch on a GPU that is not there: public calls on tensors without memory.

Tensors are torch's meta tensors, so the goal shapes cost nothing; while recording they say that they lie on a CUDA
device of the architecture asked for, the library ops run their real implementations, and Triton keeps what it is told
to launch instead of compiling it. So whatever a launcher decides by architecture and shape is what is recorded.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from moe_kernels import backend

__all__ = ["DEVICES", "OPTIONS", "Glue", "Launch", "described", "record"]

# (multiprocessors, shared memory a block may have) of A100, L40S, H200, B200
DEVICES = {80: (108, 163 * 1024), 89: (142, 99 * 1024), 90: (132, 227 * 1024), 100: (148, 227 * 1024)}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_DEVICE, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class Launch(NamedTuple):
    """One kernel launch: values of all parameters by name, compile options, grid."""

    kernel: JITFunction
    values: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensor parameters by name."""
        return {name: value for name, value in self.values.items() if isinstance(value, Tensor)}

    @property
    def bytes_moved(self) -> int:
        """The fewest bytes through device memory: each tensor read or written once."""
        return sum({_identity(t): t.numel() * t.itemsize for t in self.tensors.values()}.values())

    @property
    def configuration(self) -> dict[str, Any]:
        """Its compile-time constants, blocks and flags, and its options."""
        constants = {p.name: self.values[p.name] for p in self.kernel.params if p.is_constexpr}
        return {**constants, **self.options}


class Glue(NamedTuple):
    """One of torch's own kernels between ours, and the fewest bytes it moves."""

    name: str
    bytes_moved: int


class _PretendCuda(TorchFunctionMode):
    """Meta tensors say that they lie on cuda:0, and what is to be made there is a meta tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DEVICE:
            return torch.device("cuda", 0)
        if func == _IS_CUDA:
            return True
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if func in (torch.Tensor.to, torch.Tensor.cuda):
            args = tuple("meta" if isinstance(a, torch.device) else a for a in args)
        return func(*args, **kwargs)


class _Watch(TorchDispatchMode):
    """Keeps torch's own operations that move bytes."""

    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        # `to` and its like are views by their schema, and copies by what they return
        only_seen = func.is_view and _storage(out) in map(_storage, given)
        if name.startswith("aten::") and not only_seen and "empty" not in name and name != "aten::detach":
            tensors = [t for t in (*given, out) if isinstance(t, Tensor)]
            sizes = {_identity(t): t.numel() * t.itemsize for t in tensors}
            if total := sum(sizes.values()):  # nothing is launched for empty tensors
                self.found.append(Glue(name.removeprefix("aten::"), total))
        return out


def record(work: Callable[[], object], arch: int) -> list[Launch | Glue]:
    """Everything that `work` would launch on a GPU of compute capability `arch` / 10, in order."""
    found: list[Launch | Glue] = []

    def keep(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        for parameter in kernel.params:
            if parameter.name not in values and parameter.has_default:
                values[parameter.name] = parameter.default
        if callable(grid):
            grid = grid(values)
        assert all(side > 0 for side in grid), f"{kernel.__name__} would be launched on grid {grid}"
        missing = {p.name for p in kernel.params} ^ set(values)
        assert not missing, f"{kernel.__name__}: {missing} given or asked for, but not both"
        found.append(Launch(kernel, values, options, tuple(grid)))

    watch = _Watch(found)
    with _device(arch, watch), patch.object(JITFunction, "run", keep), watch:
        work()
    return found


@contextmanager
def _device(arch: int, watch: TorchDispatchMode) -> Iterator[None]:
    """CUDA as `arch` has it, as far as launchers ask; library ops run what they run on a GPU."""
    processors, shared = DEVICES[arch]
    properties = SimpleNamespace(
        name=f"sm_{arch}", major=arch // 10, minor=arch % 10, multi_processor_count=processors,
        shared_memory_per_block_optin=shared, L2_cache_size=50 * 2**20, warp_size=32,
    )  # fmt: skip
    mode = _PretendCuda()
    with ExitStack() as stack:
        enter = stack.enter_context
        for op in OPDEFS.values():
            if op._namespace == "moe_kernels":
                enter(patch.object(op, "_abstract_fn", _within((mode, watch), op._init_fn)))
        enter(patch.object(backend, "_self_check", lambda *asked: None))
        enter(patch.object(backend, "_resolved", {}))
        enter(patch.object(torch.cuda, "is_available", lambda: True))
        enter(patch.object(torch.cuda, "device", lambda device: ExitStack()))
        enter(patch.object(torch.cuda, "current_device", lambda: 0))
        enter(patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)))
        enter(patch.object(torch.cuda, "get_device_properties", lambda device=None: properties))
        enter(patch.object(torch.cuda, "get_device_name", lambda device=None: properties.name))
        enter(mode)
        yield


def _within(modes: tuple[AbstractContextManager[Any], ...], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Torch leaves modes while it dispatches; the implementation enters ours again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return implementation(*args, **kwargs)

    return run


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    """Meta tensors have no address: their storage tells them apart."""
    return _storage(tensor), tensor.storage_offset(), math.prod(tensor.shape)


def _storage(tensor: Any) -> int:
    """Of a view of several tensors, the first one's."""
    first = tensor if isinstance(tensor, Tensor) else tensor[0]
    return first.untyped_storage()._cdata


def described(launch: Launch) -> str:
    """`BM=128 BN=128 … warps 8 stages 3`, without what is off."""
    words = {"num_warps": "warps", "num_stages": "stages", "num_ctas": "ctas"}
    return " ".join(
        f"{words[name]} {value}" if name in words else f"{name}={int(value) if value is True else value}"
        for name, value in launch.configuration.items()
        if value not in (None, False, "", 0) and not isinstance(value, float)
    )  # fmt: skip
