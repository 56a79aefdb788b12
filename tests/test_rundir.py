"""The run directory: names cannot climb, files are whole or absent, metrics keep the final lineage."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moe.errors import CompareError, ConfigError
from moe.rundir import MetricsWriter, RunDir, read_metrics, write_json


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", "-x", ".hidden", "a\0b", "a" * 101, "a b", "ü"])
def test_a_name_cannot_leave_its_folder(name: str) -> None:
    """Only plain folder names are run names."""
    with pytest.raises(ConfigError, match=r"run\.name=.* must be a plain folder name"):
        RunDir.named(name)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    """A file where the folder should be, and a real refusal: root may write anywhere, so the child becomes nobody."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.name='x': .* cannot be written \(Not a directory\)"):
        RunDir.named("x", tmp_path / "file").create()
    code = (
        "import os, sys\n"
        "from moe.errors import ConfigError\n"
        "from moe.rundir import RunDir\n"
        "os.getuid() == 0 and os.setuid(65534)\n"
        "try: RunDir.named('x', sys.argv[1]).create()\n"
        "except ConfigError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert "cannot be written (Permission denied); choose another folder with run.directory=PATH" in done.stdout, done


def test_metrics_keep_the_final_lineage(tmp_path: Path) -> None:
    """Work after the checkpoint a later segment resumed from is left out; a torn last line is survived."""
    path = tmp_path / "metrics.jsonl"
    first = MetricsWriter(path, segment=0, resumed_step=0)
    for step in (1, 2, 3, 4):
        first.append({"train/step": step, "train/loss": 9.0})
    first.close()
    with path.open("ab") as file:
        file.write(b'{"segment": 0, "train/st')  # a kill in the middle of a line
    second = MetricsWriter(path, segment=1, resumed_step=2)
    second.append({"train/step": 3, "train/loss": 8.0})
    second.close()
    assert [(r["train/step"], r["train/loss"], r["segment"]) for r in read_metrics(path)] == [
        (1, 9.0, 0),
        (2, 9.0, 0),
        (3, 8.0, 1),
    ]
    boottimes = [json.loads(line)["boottime_ns"] for line in path.read_text().splitlines() if line.endswith("}")]
    assert boottimes == sorted(boottimes)


def test_a_restart_at_zero_keeps_nothing(tmp_path: Path) -> None:
    """The evaluation before the first step of an earlier, lost attempt is not this lineage's."""
    path = tmp_path / "metrics.jsonl"
    for segment, loss in enumerate((9.0, 8.0)):
        writer = MetricsWriter(path, segment=segment, resumed_step=0)
        writer.append({"train/step": 0, "eval/loss": loss})
        writer.close()
    assert [row["eval/loss"] for row in read_metrics(path)] == [8.0]


def test_foreign_metrics_are_refused(tmp_path: Path) -> None:
    """A file of another program is named with its line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(CompareError, match="line 1 has no segment"):
        read_metrics(path)
    with pytest.raises(CompareError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


@pytest.mark.parametrize("value", ['"3"', "null", "2.5", "true", "-1", "[1]", "NaN", '{"a": 1}'])
@pytest.mark.parametrize("name", ["segment", "train/step", "resumed_step"])
def test_tampered_metrics_are_refused(tmp_path: Path, name: str, value: str) -> None:
    """A step that is no count is one sentence with its line, not a TypeError in whoever compares it."""
    path = tmp_path / "metrics.jsonl"
    whole = [{"segment": 0, "train/step": step} for step in range(3)] + [{"segment": 1, "train/step": 2}]
    whole[-1]["resumed_step"] = 2
    lines = [json.dumps(row) for row in whole]
    lines[-1] = json.dumps(whole[-1] | {name: "?"}).replace('"?"', value)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CompareError, match=rf"line 4 says {name} is .* not a count; restore the file$") as caught:
        read_metrics(path)
    assert "\n" not in str(caught.value)


def test_json_files_are_whole_or_old(tmp_path: Path) -> None:
    """A value that cannot be written leaves the file as it was, and what is missing is named."""
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    run = RunDir.existing(tmp_path)
    assert run.read_json(path) == {"a": 1}
    with pytest.raises(CompareError, match=r"data\.json is missing"):
        run.read_json(run.data)
    path.write_text("{")
    with pytest.raises(CompareError, match="is not valid JSON"):
        run.read_json(path)


def test_ledgers_of_all_nodes_in_order(tmp_path: Path) -> None:
    """The first node's comes first and numbers sort as numbers."""
    for name in (
        "ledger.node10.jsonl",
        "ledger.node2.jsonl",
        "ledger.nodeX.jsonl",
        "ledger.jsonl",
        "ledger.jsonl.lock",
    ):
        (tmp_path / name).write_text("")
    assert [p.name for p in RunDir(tmp_path).ledgers()] == ["ledger.jsonl", "ledger.node2.jsonl", "ledger.node10.jsonl"]
