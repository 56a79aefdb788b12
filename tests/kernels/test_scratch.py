"""Buffers that are used again: the same memory for the same name, another for another name or dtype."""

import torch

from moe_kernels.scratch import Scratch


def test_worked_example() -> None:
    """A name's buffer is found again, whole or in part, and grows where more is asked for."""
    scratch = Scratch(torch.device("cpu"))
    first = scratch("a", (2, 3), torch.float32)
    assert (first.shape, first.is_contiguous()) == ((2, 3), True)
    assert scratch("a", (1, 4), torch.float32).data_ptr() == first.data_ptr()
    others = (scratch("b", (2, 3), torch.float32), scratch("a", (2, 3), torch.bfloat16))
    assert len({first.data_ptr(), *(other.data_ptr() for other in others)}) == 3
    assert scratch("a", (3, 3), torch.float32).shape == (3, 3)
    assert scratch("a", (0, 3), torch.float32).shape == (0, 3)
