"""What a training process does with memory that it frees."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from moe.trainer.host_memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left_alone = faults()
keep_freed()
faults()  # the heap grows once
print(left_alone, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's settings are glibc's")
def test_a_large_tensor_lies_in_pages_that_an_earlier_one_left() -> None:
    """Each page of a tensor is a fault when malloc maps it anew; kept memory has none."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    left_alone, kept = map(int, ran.stdout.split())
    assert left_alone >= 4 * 32  # 32 even where the system gives pages of 2 MiB
    assert kept < 32
