"""Which implementation runs: `torch` (reference and fast CPU path) or `triton`.

A module resolves its backend once, when it is built, and hands the name to every op:

    backend = resolve(None, torch.device("cuda"))   # "triton" on a GPU of compute capability 8.0 or newer
    y = expert_mlp(..., backend=backend)

An explicit name always wins and is never replaced: asking for `triton` where it cannot run is a `KernelError`. Left to
itself, a GPU that Triton cannot run on gets `torch`, and the log says so once. The first time Triton is resolved on a
CUDA device, every op runs forward and backward on a tiny problem against the torch reference (see `selfcheck.py`): a
kernel compiled wrongly stops the run instead of training on wrong gradients.
"""

import logging

import torch

from . import _triton
from .errors import KernelError

__all__ = ["resolve"]

_MIN_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)
_said: set[str] = set()

# (device name, triton version, torch version) whose kernels agreed with the reference in this process
_checked: set[tuple[str, str, str]] = set()


def resolve(backend: str | None, device: torch.device | str) -> str:
    """Return `"torch"` or `"triton"` for tensors on `device`.

    backend: explicit choice, or None for Triton on CUDA devices that can run it and torch elsewhere.
    Raises KernelError when the backend is unknown, cannot run on this device, or fails its numerical self-check.
    """
    if backend == "torch":
        return backend
    return _resolve(backend, str(device))


@torch.compiler.assume_constant_result
def _resolve(backend: str | None, device_name: str) -> str:
    if backend not in (None, "torch", "triton"):
        raise KernelError(f"backend={backend!r} is unknown: use 'torch', 'triton' or None")
    device = torch.device(device_name)
    obstacle = _obstacle(device)
    if backend is None and (device.type != "cuda" or obstacle is not None):
        if device.type == "cuda":
            _say_once(f"backend 'torch' is used on {device_name}, because triton cannot run there: {obstacle}")
        return "torch"
    if obstacle is not None:
        raise KernelError(f"backend='triton' cannot run on {device_name}: {obstacle}")
    if device.type == "cuda":
        _self_check(device)
    return "triton"


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on this device and what to do about it; None when it can."""
    if not _triton.HAVE_TRITON:
        return "triton is not installed; pip install 'triton>=3.6' or pass backend='torch'"
    if _triton.INTERPRETED:
        return None if device.type in ("cpu", "cuda") else "the interpreter takes CPU tensors; pass backend='torch'"
    if device.type != "cuda":
        return "it needs a CUDA device; pass backend='torch'"
    if torch.version.hip is not None:
        return "its kernels are checked on NVIDIA devices only; pass backend='torch'"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"compute capability {found} is below 8.0; pass backend='torch'"
    return None


def _self_check(device: torch.device) -> None:
    key = (torch.cuda.get_device_name(device), _triton.VERSION, torch.__version__)
    if key in _checked:
        return
    _checked.add(key)  # first, because the check itself calls the ops, and they resolve again
    try:
        from .selfcheck import check_kernels

        check_kernels(device)
    except BaseException:
        _checked.discard(key)
        raise
