"""NVIDIA's management library through unmodified nvidia-ml-py, and its errors as sentences that say what to do."""

from pathlib import Path
from typing import Any

from moe.errors import SensorError

__all__ = ["NoNvmlError", "mend_of", "nvml"]

NVIDIA_DRIVER = Path("/dev/nvidiactl")  # there when this machine or container has an NVIDIA driver


class NoNvmlError(SensorError):
    """This machine has no NVIDIA driver (or none is visible from this container)."""


def nvml() -> Any:
    """The initialised `pynvml` module. Raises SensorError where NVML cannot be used, with the driver's reason."""
    try:
        import pynvml
    except ImportError:
        kind = SensorError if NVIDIA_DRIVER.exists() else NoNvmlError
        raise kind("nvidia-ml-py is not installed: `pip install nvidia-ml-py`, or declare the power") from None
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
        raise NoNvmlError(
            f"NVML cannot be used ({error}): let the container see the driver's utilities, or declare the power"
        ) from None
    except pynvml.NVMLError as error:
        raise SensorError(f"NVML cannot be used ({error}): {mend_of(pynvml, error)}") from None
    return pynvml


def mend_of(lib: Any, error: Exception) -> str:
    """What the user can do about an NVMLError met before any number was read."""
    mends = {
        lib.NVML_ERROR_NO_PERMISSION: "this user or container may not use it, ask the scheduler for it",
        lib.NVML_ERROR_GPU_IS_LOST: "it fell off the bus, reboot the node",
        lib.NVML_ERROR_RESET_REQUIRED: "reset it with `nvidia-smi -r`, or reboot the node",
        lib.NVML_ERROR_NOT_FOUND: "name one that `nvidia-smi -L` lists",
        lib.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated under the running system, reboot the node",
        lib.NVML_ERROR_FUNCTION_NOT_FOUND: "the driver is too old, update it",
    }
    return mends.get(getattr(error, "value", None), "check the driver") + ", or declare the power"
