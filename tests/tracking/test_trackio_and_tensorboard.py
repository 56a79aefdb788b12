"""What trackio and TensorBoard keep of a resumed run, read back from their own files: each step once."""

import json
import sqlite3
from typing import Any

import pytest

from moe.rundir import read_metrics

Tracked = Any  # the fixture's class; conftest is not importable by name


def test_trackio_has_each_step_once(tracked: Tracked) -> None:
    """One run under one name; rows of steps and of evaluations have every axis."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    (database,) = tracked.trackio.glob("*.db")
    with sqlite3.connect(database) as connection:
        written = connection.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        ((name, config),) = connection.execute("SELECT run_name, config FROM configs").fetchall()
    assert {row[1] for row in written} == {name}
    assert len({row[0] for row in written}) == 1
    assert name == json.loads((tracked.run("twice") / "tracking.json").read_text())["trackio"]
    rows = [(step, json.loads(metrics)) for _, _, step, metrics in written]
    assert [step for step, row in rows if "train/loss" in row] == list(range(1, 15))
    evaluations = {step: row for step, row in rows if "eval/loss" in row}
    assert list(evaluations) == [0, 10, 12, 14]
    trained = {step: row for step, row in rows if "train/loss" in row}
    for step in (10, 12, 14):
        for axis in ("train/tokens", "train/device_hours", "energy/total_kwh"):
            assert evaluations[step][axis] >= trained[step][axis]
    assert json.loads(config)["model"]["hidden_size"] == 16
    assert not any(tracked.key.encode() in path.read_bytes() for path in tracked.trackio.rglob("*") if path.is_file())


def test_tensorboard_has_the_final_lineage(tracked: Tracked) -> None:
    """Steps a restart redid are there once, with the later values: scalars equal metrics.jsonl as it is read."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.run("twice") / "tensorboard"))
    events.Reload()
    rows = read_metrics(tracked.run("twice") / "metrics.jsonl")
    for name in ("train/loss", "eval/loss", "router/max_vio", "efficiency/tokens_per_s"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        wanted = {row["train/step"]: row[name] for row in rows if name in row}
        assert shown == pytest.approx(wanted, rel=1e-6)
        assert len(events.Scalars(name)) == len(wanted)
    assert "config/text_summary" in events.Tags()["tensors"]
