"""Checkpoints of Hugging Face in and out: directories of config.json + safetensors, as on its hub.

>>> model = moe.hf.load("OLMoE-1B-7B")          # a moe.Transformer
>>> moe.hf.save(model, "mine", like="OLMoE-1B-7B")  # transformers, vLLM and others load it as their own class
>>> moe.hf.EnergyCallback().add_to(trainer)     # meters a transformers.Trainer
"""

from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError
from moe.hf.reading import load
from moe.hf.writing import save

if TYPE_CHECKING:
    from moe.hf.energy_callback import EnergyCallback

__all__ = ["EnergyCallback", "load", "save"]


def __getattr__(name: str) -> Any:
    """EnergyCallback when it is asked for: it alone needs transformers."""
    if name != "EnergyCallback":
        raise AttributeError(f"module 'moe.hf' has no attribute {name!r}")
    try:
        from moe.hf.energy_callback import EnergyCallback
    except ModuleNotFoundError as error:
        raise ConfigError(f"EnergyCallback needs {error.name}: pip install 'frugal-moe[hf]'") from None
    return EnergyCallback
