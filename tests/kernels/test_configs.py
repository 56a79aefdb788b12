"""The table of tile sizes has an answer for every kernel, GPU, dtype and shape, and the right one."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from moe_kernels import configs
from moe_kernels.configs import config_for, few_programs, n_programs, row_block

KERNELS = ("product", "swiglu", "swiglu_backward", "wgrad", "wgrad_gathered")
CPU = torch.device("cpu")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_every_case_has_a_configuration(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """TMA only where there is shared memory for it and rows are aligned; warp-specialised loops only on Hopper, where
    the compiler makes them of 4 warps with both operands by TMA, and ignores the wish or fails elsewhere."""
    monkeypatch.setattr(configs, "capability_of", lambda device: capability)
    for kernel, dtype, aligned in product(KERNELS, (torch.bfloat16, torch.float16, torch.float32), (True, False)):
        for block in (16, 64) if dtype == torch.float32 else (16, 64, 128):
            config = config_for(kernel, dtype, CPU, block, aligned)
            assert config.rows == block or "wgrad" in kernel
            assert config.tma == (capability[0] in (9, 10) and aligned and dtype != torch.float32)
            assert config.precision == ("ieee" if dtype == torch.float32 else "tf32")
            if config.specialize:
                assert (kernel, capability, config.num_warps, config.flatten) == ("product", (9, 0), 4, False)


@pytest.mark.parametrize(
    ("n_rows", "n_experts", "height"), [(1, 1, 16), (2048, 64, 16), (2049, 64, 64), (16383, 64, 64), (16384, 64, 128)]
)
def test_tiles_are_as_high_as_experts_have_rows(n_rows: int, n_experts: int, height: int) -> None:
    """By the mean, which the host knows; without tensor cores no tile is higher than 64 rows."""
    assert row_block(torch.bfloat16, n_rows, n_experts) == height
    assert row_block(torch.float32, n_rows, n_experts) == min(height, 64)


def test_no_more_programs_than_work() -> None:
    """A program without a tile would only cost its start."""
    config = config_for("product", torch.bfloat16, CPU, 16, True)
    assert n_programs(config, CPU, 2) == 2
    assert n_programs(config, CPU, 1000) == 3 * config.per_sm


def test_few_programs_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check's small problems must give each program several tiles on a GPU too."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    config = config_for("product", torch.bfloat16, CPU, 128, True)
    assert n_programs(config, gpu, 1000) == 132
    with few_programs():
        assert n_programs(config, gpu, 1000) == 3
    assert n_programs(config, gpu, 1000) == 132
