"""Which implementation runs: `torch` (reference and fast CPU path) or `triton`.

Every op resolves its `backend` argument by the device of its tensors, at each call; the answer for a device is worked
out once and looked up afterwards:

    y = expert_mlp(...)                     # triton on a GPU of compute capability 8.0 or newer
    y = expert_mlp(..., backend="torch")    # torch

An explicit name always wins and is never replaced: asking for `triton` where it cannot run is a `KernelError`. Left to
itself, a GPU that Triton cannot run on gets `torch`, and the log says so once.

Every op file registers a self-check when it is imported: the op forward and backward on a tiny problem, against the
torch reference (see `agreement.py`). Resolving Triton on a CUDA device first runs those that have not passed there yet.
An op's file imports those of the ops it is built of, so no op computes anything before every family of its tiles was
checked in fp32 and bf16: one compiled wrongly stops the run instead of training on wrong gradients. Not checked are
fp16, transposed weights, weighting="none", and the kernel that stores no pre-activations, of inference.
"""

import logging
from threading import Lock

import torch

from . import _triton
from .agreement import Check
from .errors import KernelError

__all__ = ["register_check", "registered_checks", "resolve"]

_MIN_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)
_said: set[str] = set()

_checks: dict[str, Check] = {}  # by the name of the op
# (op, device name, triton version, torch version) that agreed with the reference in this process
_passed: set[tuple[str, str, str, str]] = set()
_checking = Lock()
_resolved: dict[tuple[str | None, str], str] = {}  # (backend asked for, device) -> answer, until another op registers


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
    answer = _resolved.get((backend, device_name))
    if answer is None:
        known = len(_checks)
        answer = _find(backend, device_name)
        # "cuda" is the current one, whichever that is; and an op that another thread imported meanwhile is unchecked
        if device_name != "cuda" and known == len(_checks):
            _resolved[backend, device_name] = answer
    return answer


def _find(backend: str | None, device_name: str) -> str:
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


def register_check(check: Check) -> None:
    """Have this op checked before Triton is used; the last statement of each op file."""
    _checks[check.op] = check
    _resolved.clear()


def registered_checks() -> list[Check]:
    """The checks of the ops whose files were imported so far."""
    return list(_checks.values())


def _self_check(device: torch.device) -> None:
    here = (torch.cuda.get_device_name(device), _triton.VERSION, torch.__version__)
    with _checking:  # other threads wait for the verdict
        missing = [check for check in registered_checks() if (check.op, *here) not in _passed]
        if missing:
            _say_once(f"checking the Triton kernels on {here[0]}: up to a minute where they were never compiled")
        for check in missing:
            check.run(device)
            _passed.add((check.op, *here))
