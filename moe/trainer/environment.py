"""What environment.json holds: enough to say on what a run's numbers were made."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from moe.energy.sources import uuid_of
from moe.parallel import ranks
from moe.trainer.hooks import Hooks

__all__ = ["describe", "device_uuid"]

_PACKAGES = (
    "frugal-moe", "triton", "accelerate", "deepspeed", "numpy", "safetensors", "tokenizers", "nvidia-ml-py",
)  # fmt: skip


def describe(device: torch.device, device_uuids: list[str], hooks: Hooks) -> dict[str, Any]:
    """Commit, versions, devices and launch of this process's run."""
    cuda = device.type == "cuda"
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": device.type,
        "devices": device_uuids,
        "hooks": None if type(hooks) is Hooks else f"{type(hooks).__module__}.{type(hooks).__qualname__}",
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {**{name: _version(name) for name in _PACKAGES}, "torch": torch.__version__},  # with its build
        "world_size": ranks.world_size(),
    }


def device_uuid(device: torch.device) -> str:
    """The meter's name of a CUDA device, "GPU-…" or "AMD-…"; empty for a processor."""
    if device.type != "cuda":
        return ""
    return uuid_of(torch.cuda.get_device_properties(device), hip=torch.version.hip is not None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package lies in, with `+` when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.returncode else "") if head.returncode == 0 else None


def _processor() -> str:
    """Model name of the processor, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
