"""Which implementation runs: `torch` (reference and fast CPU path) or `triton`.

Every op resolves its `backend` argument by the device of its tensors, at each call; the answer for a device is worked
out once and looked up afterwards:

    y = expert_mlp(...)                     # triton on a GPU of compute capability 8.0 or newer
    y = expert_mlp(..., backend="torch")    # torch

An explicit name always wins and is never replaced: asking for `triton` where it cannot run is a `KernelError`. Left to
itself, a GPU that Triton cannot run on gets `torch`, and the log says so once.

Every op file registers a self-check when it is imported: the op forward and backward on small problems, against the
torch reference (see `agreement.py`). The first use of an op on a CUDA device in a dtype runs its check there in that
dtype, so who trains in bf16 does not wait for kernels of fp16. Each probe launches all that its op does: fp32, bf16 and
fp16; every family of tiles; weights that lie either way round, of the activations' dtype or masters in fp32; the
routing weight after, before and nowhere; h stored and not; counts given and not. A family has each of these, of the
places of the routing weight two, and not each with every other. A kernel compiled wrongly stops the run instead of
training on wrong gradients.

Not checked are what Triton compiles anew for a number that only the model knows (top-k, experts, groups), integers
other than int64 as choices, and the wrong code that only such a number or a larger size brings out.
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
# (op, dtype, device name, triton version, torch version) that agreed with the reference in this process
_passed: set[tuple[str, torch.dtype, str, str, str]] = set()
_checking = Lock()
# (backend asked for, device, op, dtype) -> answer
_resolved: dict[tuple[str | None, str, str | None, torch.dtype | None], str] = {}


def resolve(
    backend: str | None, device: torch.device | str, op: str | None = None, dtype: torch.dtype | None = None
) -> str:
    """Return `"torch"` or `"triton"` for tensors on `device`.

    backend: explicit choice, or None for Triton on CUDA devices that can run it and torch elsewhere.
    op, dtype: what is about to be computed, and in which dtype if it takes several: Triton is checked for that first;
    for all dtypes without one, and for every op imported so far without an op.
    Raises KernelError when the backend is unknown, cannot run on this device, or fails its numerical self-check.
    """
    if backend == "torch":
        return backend
    return _resolve(backend, str(device), op, dtype)


@torch.compiler.assume_constant_result
def _resolve(backend: str | None, device_name: str, op: str | None, dtype: torch.dtype | None) -> str:
    asked = (backend, device_name, op, dtype)
    answer = _resolved.get(asked)
    if answer is None:
        answer = _find(*asked)
        if device_name != "cuda" and op is not None:  # the current one, whichever that is; and ops may yet be imported
            _resolved[asked] = answer
    return answer


def _find(backend: str | None, device_name: str, op: str | None, dtype: torch.dtype | None) -> str:
    if backend not in (None, "torch", "triton"):
        raise KernelError(f"backend={backend!r} is unknown: use 'torch', 'triton' or None")
    device = torch.device(device_name)
    obstacle = _obstacle(device, op, dtype)
    if backend is None and (device.type != "cuda" or obstacle is not None):
        if device.type == "cuda":
            _say_once(f"backend 'torch' is used on {device_name}, because triton cannot run there: {obstacle}")
        return "torch"
    if obstacle is not None:
        raise KernelError(f"backend='triton' cannot run on {device_name}: {obstacle}")
    if device.type == "cuda":
        _self_check(device, op, dtype)
    return "triton"


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _log.warning(message)


def _obstacle(device: torch.device, op: str | None, dtype: torch.dtype | None) -> str | None:
    """Why Triton cannot run there and what to do about it; None when it can."""
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
    if op is not None and dtype is not None and dtype not in _checks[op].tolerance:
        return f"{op} in {dtype} has no self-check; cast to one of {', '.join(map(str, _checks[op].tolerance))}"
    return None


def register_check(check: Check) -> None:
    """Have this op checked before Triton is used; the last statement of each op file."""
    _checks[check.op] = check


def registered_checks() -> list[Check]:
    """The checks of the ops whose files were imported so far."""
    return list(_checks.values())


def _self_check(device: torch.device, op: str | None, dtype: torch.dtype | None) -> None:
    here = (torch.cuda.get_device_name(device), _triton.VERSION, torch.__version__)
    checks = [_checks[op]] if op else [c for c in registered_checks() if c.runs_on(device)]
    with _checking:  # other threads wait for the verdict
        missing = [
            (check, tested)
            for check in checks
            for tested in check.tolerance
            if dtype in (None, tested) and (check.op, tested, *here) not in _passed
        ]
        if missing:
            _say_once(f"checking the Triton kernels on {here[0]}: may take a minute where they were never compiled")
        for check, tested in missing:
            check.run(device, tested)
            _passed.add((check.op, tested, *here))
