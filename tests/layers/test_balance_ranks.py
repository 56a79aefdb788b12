"""Two real processes under DistributedDataParallel: loads are summed before biases move, and no wrapper disturbs them.

Run as a program, this file is one of the processes; the tests start them and read what each saw.
"""

import datetime
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, MICRO_BATCHES = 3, 3


def _rank(method: str, folder: Path, rank: int) -> None:
    """Train a layer on this rank's own tokens, buffers broadcast as torch does by default; write down what was seen."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from moe.balancer import Balancer
    from moe.layers import MoE

    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    torch.manual_seed(0)
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8)
    nn.init.normal_(layer.router.weight, std=0.3)
    if rank == 1:  # no token of this rank reaches expert 0: its gradient must be zeros, or the ranks would wait
        _avoid(layer)
    wrapped = nn.parallel.DistributedDataParallel(layer, broadcast_buffers=True)
    balancer = Balancer(layer, method=method, bias_update_speed=0.01)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    calls = _count_collectives(dist)
    seen: dict[str, Any] = {"local": [], "global": [], "bias": [], "collectives": []}
    torch.manual_seed(rank + 1)
    for _ in range(STEPS):
        local: list[Any] = []
        hook = layer.router.register_forward_hook(lambda m, a, route, to=local: to.append(route.tokens_per_expert_E))
        for number in range(MICRO_BATCHES):
            x = torch.randn(4, 10, 16) + (rank - 0.5)
            with wrapped.no_sync() if number == 0 else nullcontext():  # both ways of accumulating
                wrapped(x).square().mean().backward()
        hook.remove()
        optimizer.step()
        optimizer.zero_grad()
        before = len(calls)
        load = balancer.step()
        seen["collectives"].append(len(calls) - before)
        seen["local"].append(torch.stack(local).sum(0).tolist())
        seen["global"].append(load.tokens_per_expert["router"].tolist())
        seen["bias"].append([value.hex() for value in layer.router.expert_bias.tolist()])
    if rank == 0:  # and once only one rank has anything to tell
        layer(torch.randn(4, 10, 16)).sum().backward()
        seen["alone"] = layer.router.tokens_per_expert.tolist()
    last = balancer.step().tokens_per_expert["router"]
    seen["last"] = [last.tolist(), [value.hex() for value in layer.router.expert_bias.tolist()]]
    seen["confidence"] = load.metrics()["router/confidence"].hex()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def _avoid(layer: Any) -> None:
    def without_first(module: Any, args: Any) -> Any:
        x, *rest = args
        direction = module.weight.detach()[0]
        return x - (x @ direction + 50).unsqueeze(-1) * direction / direction.square().sum(), *rest

    layer.router.register_forward_pre_hook(without_first)


def _count_collectives(dist: Any) -> list[int]:
    calls: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Any, *args: Any, **more: Any) -> Any:
        calls.append(tensor.numel())
        return real(tensor, *args, **more)

    dist.all_reduce = counted
    return calls


@pytest.fixture(scope="module", params=["sign", "quantile"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, request.param, str(folder)]
    with (folder / "complaints").open("w") as complaints:
        processes = [subprocess.Popen([*command, str(n)], env=environment, stderr=complaints) for n in range(2)]
        codes = [process.wait(timeout=120) for process in processes]
    assert codes == [0, 0], (folder / "complaints").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_loads_are_summed_over_ranks_and_micro_batches(ranks: list[dict[str, Any]]) -> None:
    """Each rank's own tokens of all micro-batches, added; the ranks differed, so neither alone would do."""
    first, second = ranks
    assert first["local"] != second["local"]
    for step in range(STEPS):
        total = [a + b for a, b in zip(first["local"][step], second["local"][step], strict=True)]
        assert first["global"][step] == second["global"][step] == total
        assert sum(total) == 2 * MICRO_BATCHES * 40 * 2


def test_biases_are_bitwise_equal_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    """After every step, and they moved."""
    assert ranks[0]["bias"] == ranks[1]["bias"]
    assert ranks[0]["confidence"] == ranks[1]["confidence"]
    steps = [tuple(bias) for bias in ranks[0]["bias"]]
    assert len(set(steps)) == STEPS


def test_one_collective_a_step(ranks: list[dict[str, Any]]) -> None:
    """Loads, margins and confidence of all routers travel together."""
    assert ranks[0]["collectives"] == [1] * STEPS


def test_a_rank_without_tokens_for_an_expert_waits_for_nobody(ranks: list[dict[str, Any]]) -> None:
    """Rank 1 never used expert 0 at first, and all steps went through."""
    assert ranks[1]["local"][0][0] == 0
    assert ranks[0]["local"][0][0] > 0


def test_a_rank_that_routed_nothing_waits_for_nobody(ranks: list[dict[str, Any]]) -> None:
    """Its zeros join the sum, and its biases move with the other's."""
    assert ranks[0]["last"] == ranks[1]["last"]
    assert ranks[0]["last"][0] == ranks[0]["alone"]


if __name__ == "__main__":
    _rank(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
