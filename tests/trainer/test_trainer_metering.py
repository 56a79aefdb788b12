"""The trainer's meter where sensors fail: training goes on, and the ledger says the energy is an estimate."""

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
