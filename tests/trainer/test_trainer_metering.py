"""The trainer's meter where sensors fail, and over several nodes: what the ledgers then say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import ModelConfig, Recipe, RunConfig, TrainConfig
from moe.energy import fold_ledgers
from moe.parallel.engine import Engine
from moe.rundir import RunDir
from moe.trainer import metering
from moe.trainer.start import Start


def test_an_unreadable_gpu_is_estimated_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A GPU no sensor knows: one sentence, 700 W under the name of an estimate, nothing called measured."""
    monkeypatch.setattr(metering, "device_uuid", lambda device: "GPU-00000000-0000-0000-0000-000000000000")
    recipe = Recipe(
        run=RunConfig(name="x"),
        model=ModelConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
            attention="gqa",
        ),
    )  # fmt: skip
    run = RunDir.named("x", tmp_path)
    run.create()
    meter = metering.TrainingMeter(recipe, run, Engine(TrainConfig()), Start(trained=False))
    meter.stop()
    assert "energy is estimated from rated power: " in capfd.readouterr().err
    fold = fold_ledgers(run.ledgers())
    assert not fold.total.measured
    assert [(device.source, device.name) for device in fold.devices] == [("estimate:tdp", "GPU at 700 W")]
    assert meter.device_uuids == ["GPU-00000000-0000-0000-0000-000000000000"]


RANK = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from moe.config import EnergyConfig, Recipe
from moe.rundir import RunDir
from moe.trainer import metering
from moe.trainer.start import Start

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=3)
metering.device_uuid = lambda device: f"GPU-{rank}"
recipe = SimpleNamespace(energy=EnergyConfig(declared_power_w=100.0, interval_s=0.1))
engine = SimpleNamespace(device=torch.device("cpu"))
meter = metering.TrainingMeter(recipe, RunDir(folder), engine, Start(trained=False))
time.sleep(0.5)
cost = meter.cost()
meter.stop()
print(json.dumps([meter.device_uuids, cost.kwh, cost.device_hours]))
dist.destroy_process_group()
"""


def test_two_ranks_and_another_node_are_metered_once_and_all(tmp_path: Path) -> None:
    """The first rank of each node bills the GPUs of all its ranks in a ledger of its own; every rank knows the sum."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": local, "GROUP_RANK": node},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, (node, local) in enumerate(("00", "01", "10"))
    ]
    told = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    uuids, kwh, device_hours = told[0]
    assert told == [told[0]] * 3
    assert uuids == [f"GPU-{rank}" for rank in range(3)]
    ledgers = RunDir(tmp_path).ledgers()
    assert [[device.uuid for device in fold_ledgers([path]).devices] for path in ledgers] == [uuids[:2], uuids[2:]]
    total = fold_ledgers(ledgers).total
    assert 0 < kwh * 3.6e6 <= total.energy_j
    assert total.device_hours >= device_hours
    assert total.energy_j <= 100 * 3600 * total.device_hours
