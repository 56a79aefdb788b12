"""Two real processes under FSDP2 with bf16 parameters: the bias stays fp32, whole, and the same on both.

Run as a program, this file is one of the processes.
"""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


def _rank(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from moe.balancer import Balancer
    from moe.layers import MoE

    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    torch.manual_seed(0)
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8)
    torch.nn.init.normal_(layer.router.weight, std=0.3)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    balancer = Balancer(layer, bias_update_speed=0.001)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    seen: dict[str, Any] = {"local": [], "global": [], "bias": []}
    torch.manual_seed(rank + 1)
    for _ in range(STEPS):
        layer(torch.randn(3, 10, 16) + rank).square().mean().backward()
        seen["local"].append(layer.router.tokens_per_expert.tolist())
        optimizer.step()
        optimizer.zero_grad()
        seen["global"].append(balancer.step().tokens_per_expert["router"].tolist())
        seen["bias"].append([value.hex() for value in layer.router.expert_bias.tolist()])
    seen["dtype"] = str(layer.router.expert_bias.dtype)
    seen["sharded"] = [type(p.data).__name__ for p in layer.parameters()]
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(folder), str(rank)], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_parameters_are_sharded_and_the_bias_is_not(ranks: list[dict[str, Any]]) -> None:
    """Every parameter is a DTensor; the bias is fp32 beside bf16 products."""
    for rank in ranks:
        assert set(rank["sharded"]) == {"DTensor"}
        assert rank["dtype"] == "torch.float32"


def test_loads_add_up_and_biases_are_bitwise_equal(ranks: list[dict[str, Any]]) -> None:
    """The sum over both ranks moves both ranks' biases, in steps bf16 could not take."""
    one, two = ranks
    for mine, theirs, both in zip(one["local"], two["local"], one["global"], strict=True):
        assert [a + b for a, b in zip(mine, theirs, strict=True)] == both
    assert one["global"] == two["global"]
    assert one["bias"] == two["bias"]
    moved = {round(abs(float.fromhex(value)) * 1000, 4) for value in one["bias"][0]}
    assert moved <= {0.0, 1.0}
    assert 1.0 in moved


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]))
