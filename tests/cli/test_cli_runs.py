"""`moe runs`: real runs, stopped, killed, broken and living, as the command tells of them."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe.cli.runs import _table
from moe.errors import MoEError
from moe.runs import list_runs, read_details

RECIPE = Path(__file__).parents[1] / "trainer" / "tiny_recipe.py"


def moe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe.cli", "runs", *words], cwd=folder, capture_output=True, text=True, timeout=120
    )


def refused(folder: Path, *words: str) -> str:
    """The one sentence of a command that must end with exit code 2."""
    done = moe(folder, *words)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `done`, and copies of it that ended otherwise."""
    folder = tmp_path_factory.mktemp("watched")
    chance = random.Random(0)
    (folder / "text").write_text(" ".join("".join(chance.choices("etaoin", k=4)) for _ in range(6000)))
    words = ("run.name=done", "train.max_steps=12", "train.checkpoint_every_steps=6")
    done = subprocess.run(
        [sys.executable, str(RECIPE), *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    runs = folder / "runs"
    for name in ("halted", "killed", "untrained", "broken", "lost", "cut"):
        shutil.copytree(runs / "done", runs / name)
    config = json.loads((runs / "halted" / "config.json").read_text())
    config["train"]["max_steps"] = 50
    (runs / "halted" / "config.json").write_text(json.dumps(config))
    ledger = runs / "killed" / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    (runs / "untrained" / "metrics.jsonl").unlink()
    (runs / "broken" / "config.json").write_text("{")
    (runs / "holiday pictures").mkdir()
    last = "checkpoints/step_00000012"
    shutil.rmtree(runs / "lost" / last)
    os.truncate(runs / "cut" / last / "optimizer.safetensors", 1000)
    return folder


def test_list_tells_the_state_of_every_folder(folder: Path) -> None:
    """By what the files say; a folder that is no run, and one that is broken, are listed with a sentence.

    A run whose last checkpoint is gone or not whole is not complete: the same command goes on from the one before.
    """
    done = moe(folder, "list", "--json")
    assert done.returncode == 0, done.stderr
    runs = {run["name"]: run for run in json.loads(done.stdout)}
    assert {name: run["state"] for name, run in runs.items()} == {
        "broken": "broken",
        "cut": "stopped",
        "done": "complete",
        "halted": "stopped",
        "holiday pictures": "no run",
        "killed": "killed",
        "lost": "stopped",
        "untrained": "not trained",
    }
    assert "is not valid JSON" in runs["broken"]["problem"]
    assert "holds no config.json" in runs["holiday pictures"]["problem"]
    run = runs["done"]
    assert (run["step"], run["max_steps"], run["tokens"]) == (12, 12, 12 * 4 * 32)
    rows = [json.loads(line) for line in (folder / "runs/done/metrics.jsonl").read_text().splitlines()]
    assert run["train_loss"] == [row["train/loss"] for row in rows if "train/loss" in row][-1]
    assert run["eval_loss"] == [row["eval/loss"] for row in rows if "eval/loss" in row][-1]
    report = [sys.executable, "-m", "moe.cli", "energy", "report", "runs/done", "--json"]
    total = json.loads(subprocess.run(report, cwd=folder, capture_output=True, check=True).stdout)["total"]
    assert run["energy_kwh"] == pytest.approx(total["energy_j"] / 3.6e6)
    assert (run["device_hours"], run["energy_source"]) == (total["device_hours"], total["source"])
    assert run["measured"] == total["measured"]


def test_list_fits_into_a_terminal(folder: Path) -> None:
    """Eighty columns hold each name, state and cost; an estimate has its mark."""
    done = moe(folder, "list", "runs")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name, state in (("done", "complete"), ("killed", "killed"), ("untrained", "not trained"), ("broken", "broken")):
        (line,) = (line for line in lines if line.startswith(f" {name} "))
        assert state in line
    if "estimate:" in done.stdout:
        assert "~" in done.stdout
    assert "…" not in done.stdout


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[]"),
        ("config.json", '{"train": null}'),
        ("metrics.jsonl", '{"segment": 0, "train/step": "three", "train/loss": 1}'),
        ("metrics.jsonl", '{"segment": 0, "train/step": 3, "train/loss": "low"}'),
        ("metrics.jsonl", '{"train/step": 3}'),
        ("ledger.jsonl", ""),
        ("ledger.jsonl", "{}\n{}\n"),
    ],
)
def test_a_broken_file_breaks_one_line_of_the_list(folder: Path, tmp_path: Path, file: str, text: str) -> None:
    """The run is listed as broken with a sentence; another one beside it, whose name holds escapes, is whole."""
    shutil.copytree(folder / "runs/done", tmp_path / "spoilt")
    shutil.copytree(folder / "runs/done", tmp_path / "\x1b[31mred")
    (tmp_path / "spoilt" / file).write_text(text)
    runs = list_runs(tmp_path)
    assert [(run.state, run.problem is None) for run in runs] == [("complete", True), ("broken", False)]
    with Console(record=True, width=80, file=io.StringIO()) as console:
        console.print(_table(runs))
    assert "\x1b" not in console.export_text()
    with pytest.raises(MoEError):
        read_details(tmp_path / "spoilt")


def test_show_is_one_screen(folder: Path) -> None:
    """Model, data, schedule, losses, cost, checkpoints and command; the same as JSON."""
    done = moe(folder, "show", "runs/done")
    assert done.returncode == 0, done.stderr
    for words in (
        "done, complete", "step 12 of 12", "active, 4 experts", "training and", "balance.method=sign", "▁", "kWh ±",
        "step_00000012", "whole", "tiny_recipe.py run.name=done",
    ):  # fmt: skip
        assert words in done.stdout, words
    assert len(done.stdout.splitlines()) < 40
    details = json.loads(moe(folder, "show", "runs/done", "--json").stdout)
    assert [step for step, _ in details["train_losses"]] == list(range(1, 13))
    assert details["status"]["state"] == "complete"
    assert [checkpoint["name"] for checkpoint in details["checkpoints"]] == ["step_00000006", "step_00000012"]
    assert all(checkpoint["fault"] is None and checkpoint["size_bytes"] > 1e4 for checkpoint in details["checkpoints"])


def test_show_a_streamed_run(folder: Path) -> None:
    """Nobody knows how long a stream is: the page says so, and JSON has null."""
    rows = "".join(json.dumps({"text": f"document {number} " * 40}) + "\n" for number in range(30))
    (folder / "rows.jsonl").write_text(rows)
    words = ("run.name=streamed", "run.directory=elsewhere", "data.source=rows.jsonl", "data.streaming=true",
             "train.max_steps=2", "train.eval_sequences=1", "model.vocab_size=260")  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(RECIPE), *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shown = moe(folder, "show", "elsewhere/streamed")
    assert shown.returncode == 0, shown.stderr
    assert "rows.jsonl: a stream of training and " in shown.stdout
    assert "streamed, complete" in shown.stdout
    details = json.loads(moe(folder, "show", "elsewhere/streamed", "--json").stdout)
    assert details["data"]["train_tokens"] is None
    assert details["data"]["validation_tokens"] > 0


def test_show_finds_what_is_not_whole(folder: Path) -> None:
    """A cut file by its size; a changed byte only by --verify."""
    shutil.copytree(folder / "runs/done", folder / "damaged")
    first, second = (folder / "damaged/checkpoints" / f"step_{step:08d}" for step in (6, 12))
    (first / "optimizer.safetensors").write_bytes(b"")
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)

    def faults(*words: str) -> list[str | None]:
        shown = json.loads(moe(folder, "show", "damaged", "--json", *words).stdout)
        return [checkpoint["fault"] for checkpoint in shown["checkpoints"]]

    cut, unseen = faults()
    assert cut is not None
    assert "optimizer.safetensors does not have the size" in cut
    assert unseen is None
    assert ["does not match its manifest" in str(fault) for fault in faults("--verify")] == [True, True]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("list", "nowhere"), "nowhere is not a folder"),
        (("show", "runs/holiday pictures"), "holds no config.json"),
        (("show", "runs/broken"), "is not valid JSON"),
        (("watch", "nowhere"), "nowhere is not a directory"),
        (("watch", "runs/broken"), "is not valid JSON"),
        (("track", "runs/done", "--to", "wandbb"), "'wandbb' is not a tracker; did you mean 'wandb'?"),
        (("track", "runs/untrained", "--to", "wandb"), "metrics.jsonl cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(folder: Path, words: tuple[str, ...], sentence: str) -> None:
    """Exit code 2 and no traceback."""
    assert sentence in refused(folder, *words)


@pytest.mark.parametrize(
    "words", [("list",), ("show", "runs/done"), ("watch", "runs/done")], ids=lambda words: words[0]
)
def test_no_torch_is_loaded(folder: Path, words: tuple[str, ...]) -> None:
    """Listing, showing and watching start at once."""
    program = f"""
import sys
from moe.cli import main
sys.argv = ["moe", "runs", *{words!r}]
try:
    main()
except SystemExit:
    print("torch" in sys.modules, "accelerate" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_a_run_is_sent_to_a_tracker_again(folder: Path) -> None:
    """Every row of the final lineage; how often does not matter."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    rows = [
        line for line in (folder / "runs/done/metrics.jsonl").read_text().splitlines() if "resumed_step" not in line
    ]
    done = moe(folder, "track", "runs/done", "--to", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(rows)} rows of runs/done sent to tensorboard\n"
    assert len(list((folder / "runs/done/tensorboard").glob("events.out.*"))) == 1


@pytest.fixture
def living(folder: Path) -> Iterator[Any]:
    """A run that trains until it is told to stop."""
    words = ("run.name=living", "train.max_steps=100000", "train.eval_every_tokens=100000000")
    process = subprocess.Popen([sys.executable, str(RECIPE), *words], cwd=folder, stderr=subprocess.PIPE, text=True)
    metrics, deadline = folder / "runs/living/metrics.jsonl", time.monotonic() + 60
    while not (metrics.is_file() and "train/loss" in metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


def test_a_living_run_is_watched_to_its_end(folder: Path, living: subprocess.Popen[str]) -> None:
    """It is listed as running; Ctrl-C leaves it running; another watcher ends with it; its trackers are its own."""
    command = [sys.executable, "-m", "moe.cli", "runs", "watch", "runs/living", "--every", "0.1"]
    leaver, watcher = (
        subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        for _ in range(2)
    )
    assert leaver.stdout is not None
    assert watcher.stdout is not None
    first = leaver.stdout.readline()
    assert first.startswith("step ")
    leaver.send_signal(signal.SIGINT)
    _, error = leaver.communicate(timeout=30)
    assert (leaver.returncode, error) == (0, "")
    states = {run["name"]: run["state"] for run in json.loads(moe(folder, "list", "--json").stdout)}
    assert states["living"] == "running"
    assert "is being trained" in refused(folder, "track", "runs/living", "--to", "wandb")
    assert living.poll() is None
    living.send_signal(signal.SIGTERM)
    said, error = watcher.communicate(timeout=60)
    assert (watcher.returncode, error) == (0, "")
    *lines, last = said.splitlines()
    steps = [int(line.removeprefix("step ").partition("/")[0]) for line in lines]
    assert len(set(steps)) > 1
    assert steps == sorted(steps)  # one may be told again, when its checkpoint or evaluation comes a look later
    assert all(word in lines[-1] for word in ("loss ", " kWh", " tokens/s", " to go"))
    reached = json.loads(moe(folder, "show", "runs/living", "--json").stdout)["status"]["step"]
    assert last == f"runs/living is stopped at step {reached} of 100000"
    assert steps[-1] <= reached
