"""Mixture-of-experts language models trained the DeepSeek-V3 way, with the energy meter running.

Importing this package imports nothing else: each name below loads its module when first used, so that `moe energy …`
starts without torch and `moe.layers` loads without the trainer.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module it lives in
_EXPORTS = {
    "Balancer": "moe.balancer",
    "EnergyMeter": "moe.energy",
    "ModelConfig": "moe.config",
    "ModelOutput": "moe.model",
    "Recipe": "moe.config",
    "RouteRecorder": "moe.replay",
    "RouteReplay": "moe.replay",
    "Transformer": "moe.model",
}
_MODULES = (
    "accounting",
    "balance",
    "balancer",
    "checkpoint",
    "compare",
    "config",
    "data",
    "energy",
    "errors",
    "hf",
    "layers",
    "model",
    "optim",
    "replay",
    "rundir",
    "trainer",
)

__all__ = sorted([*_EXPORTS, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return import_module(f"moe.{name}")
    raise AttributeError(f"module 'moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
