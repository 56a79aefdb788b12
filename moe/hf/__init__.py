"""Checkpoints of Hugging Face in and out: directories of config.json + safetensors, as on its hub.

>>> model = moe.hf.load("OLMoE-1B-7B")          # a moe.Transformer
>>> moe.hf.save(model, "mine", like="OLMoE-1B-7B")  # transformers, vLLM and others load it as their own class
"""

from moe.hf.reading import load
from moe.hf.writing import save

__all__ = ["load", "save"]
