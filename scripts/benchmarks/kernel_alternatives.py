"""Other ways to launch our products, timed beside the table's own: which is fastest only a GPU can say.

    plain      ungathered products without warp specialisation: 8 warps, one loop over all tiles
    pointers   every operand by `cp.async`, with the tiles of GPUs that have no TMA

An alternative that wins becomes the entry of `moe_kernels/configs.py`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch

from moe_kernels import configs

__all__ = ["alternatives"]


def alternatives(device: str) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """By name, what to be within while launching; those that differ on this device from what is launched anyway."""
    major = configs.capability_of(torch.device(device))[0]
    plain = {("product", "hopper", 128): configs._TABLE["product", "blackwell", 128]}
    found: dict[str, Callable[[], AbstractContextManager[object]]] = {}
    if major == 9:
        found["plain"] = lambda: patch.dict(configs._TABLE, plain)
    if major in configs._TMA_PLACES:
        found["pointers"] = lambda: patch.dict(configs._TMA_PLACES, clear=True)
    return found
