"""The self-checks of all ops at once, whichever are in use: for a new machine or compiler, or Triton's interpreter."""

import torch

from . import dispatch, gemm, mlp, routing
from .backend import registered_checks

__all__ = ["check_kernels"]

_OPS = (dispatch, gemm, mlp, routing)  # each registered its check when it was imported above


def check_kernels(device: torch.device | str) -> None:
    """Raise KernelError if any Triton kernel disagrees with the torch reference on this device, in any dtype.

    What the device has no instructions for is left out: there the op refuses to run. In the interpreter in fp32 alone:
    how it rounds to 16 bits is not the compiler's doing.
    """
    device = torch.device(device)
    for check in registered_checks():
        if check.runs_on(device):
            for dtype in check.tolerance if device.type == "cuda" else [torch.float32]:
                check.run(device, dtype)
