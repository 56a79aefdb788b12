"""What W&B keeps of a run, read back from its offline files: names, axes, configuration, one id; and no key."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Tracked = Any  # the fixture's class; conftest is not importable by name

pytest.importorskip("wandb", reason="wandb is not installed")

_BLOCK, _HEADER, _MAGIC = 32 * 1024, 7, 0xBEE1
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records_of(file: Path) -> Iterator[Any]:
    """The Record messages of a .wandb file: a LevelDB log behind seven bytes that name W&B's format."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert struct.unpack("<4sHB", data[:_HEADER]) == (b":W&B", _MAGIC, 0)
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # a header never straddles two blocks
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        part = data[position + _HEADER : position + _HEADER + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
        position += _HEADER + length


def items_of(message: Any) -> dict[str, Any]:
    """Name -> value of a history or configuration message."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in message}


@pytest.fixture(scope="module")
def segments(tracked: Tracked) -> list[list[Any]]:
    """The records of each process of the run, in order."""
    files = sorted(tracked.run("twice").glob("wandb/offline-run-*/run-*.wandb"))
    return [list(records_of(file)) for file in files]


def test_both_processes_write_one_run(tracked: Tracked, segments: list[list[Any]]) -> None:
    """A resume has the id, name and project of the first process; without a key it is offline; only rank 0 writes."""
    runs = [record.run for records in segments for record in records if record.WhichOneof("record_type") == "run"]
    identity = json.loads((tracked.run("twice") / "tracking.json").read_text())["wandb"]
    assert {run.run_id for run in runs} == {identity}
    assert {(run.display_name, run.project) for run in runs} == {("twice", "frugal-moe")}
    assert len(segments) == 2


def test_every_row_arrives_with_its_axes(tracked: Tracked, segments: list[list[Any]]) -> None:
    """W&B's values are those of metrics.jsonl; each evaluation also has tokens, device-hours and energy."""
    for number, records in enumerate(segments):
        lines = (tracked.run("twice") / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["segment"] == number and "resumed_step" not in row]
        written = {
            record.history.step.num: items_of(record.history.item)
            for record in records
            if record.WhichOneof("record_type") == "history"
        }
        assert sorted(written) == sorted({row["train/step"] for row in rows})
        joined: dict[int, dict[str, Any]] = {}  # W&B joins what is logged under one step
        for row in rows:
            values = {name: value for name, value in row.items() if "/" in name}
            joined[row["train/step"]] = joined.get(row["train/step"], {}) | values
        for step, row in joined.items():
            assert row.items() <= written[step].items()
            assert {"train/tokens", "train/device_hours", "energy/total_kwh"} <= written[step].keys()
        groups = {name.partition("/")[0] for history in written.values() for name in history if "/" in name}
        assert groups == {"train", "eval", "router", "energy", "efficiency"}


def test_axes_are_defined(segments: list[list[Any]]) -> None:
    """Each group is drawn on its axis, eval/loss too, which is defined by name; the best of it is the summary."""
    for records in segments:
        defined = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
        axes = {metric.glob_name or metric.name: metric.step_metric for metric in defined}
        assert axes == {
            "train/*": "train/step",
            "router/*": "train/step",
            "energy/*": "train/step",
            "efficiency/*": "train/step",
            "eval/*": "train/tokens",
            "eval/loss": "train/tokens",
            "train/step": "",
            "train/tokens": "",
            "train/device_hours": "",
            "energy/total_kwh": "",
        }
        assert [metric.name for metric in defined if metric.summary.min] == ["eval/loss"]


def test_the_recipe_is_the_configuration(tracked: Tracked, segments: list[list[Any]]) -> None:
    """Nested as in config.json, and the second process has its own max_steps."""
    wanted = json.loads((tracked.run("twice") / "config.json").read_text())
    for records, max_steps in zip(segments, (12, 14), strict=True):
        config: dict[str, Any] = {}
        for record in records:
            kind = record.WhichOneof("record_type")
            config |= items_of(record.config.update if kind == "config" else record.run.config.update)
        assert config["train"]["max_steps"] == max_steps
        assert config["model"] == wanted["model"]
        assert config["balance"] == wanted["balance"]


def test_no_key_is_written(tracked: Tracked) -> None:
    """The first process had a key in its environment; no file of the run directory has it."""
    files = [path for path in tracked.run("twice").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if tracked.key.encode() in path.read_bytes()]
