"""W&B online: its own client against a server on this machine, which keeps what comes, refuses the key, or dies."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import KEY, RECIPE, Tracked
from .wandb_server import SentRun, Server

pytest.importorskip("wandb", reason="wandb is not installed")

WORDS = ("tracking.trackers=wandb", "train.checkpoint_every_steps=5")
# the recipe with W&B's patience, of half a minute and a minute, as given in seconds
HURRIED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from moe.tracking import trackers
trackers._START_S, trackers._FINISH_S = int(sys.argv.pop(1)), int(sys.argv.pop(1))
from tiny_recipe import RECIPE, main
main(RECIPE)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    return Tracked(tmp_path_factory.mktemp("online"))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(KEY)
    yield made
    made.close()


def online(server: Server) -> dict[str, str]:
    return {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}


def rows_of(run: Path, segment: int) -> dict[int, dict[str, Any]]:
    """By step what metrics.jsonl has of a segment, as W&B joins it."""
    joined: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if row["segment"] == segment and "resumed_step" not in row:
            values = {name: value for name, value in row.items() if "/" in name}
            joined[row["train/step"]] = joined.get(row["train/step"], {}) | values
    return joined


def axes_of(run: SentRun) -> dict[str, str]:
    """Metric, or group of metrics -> what it is drawn against: fields 1, 2 and 5 of W&B's MetricRecord."""
    defined = run.config["_wandb"]["value"]["m"]
    names = [metric.get("1") or metric["2"] for metric in defined]
    return {name: names[metric["5"] - 1] if "5" in metric else "" for name, metric in zip(names, defined, strict=True)}


def test_a_run_and_its_resume_are_one_run(place: Tracked, server: Server) -> None:
    """Names, axes, recipe and every row arrive; the second process goes on under the same id; no file has the key."""
    first = place.train("run.name=online", *WORDS, "train.max_steps=12", **online(server))
    assert first.returncode == 0, first.stderr
    back = "train.resume=runs/online/checkpoints/step_00000010"
    second = place.train("run.name=online", *WORDS, "train.max_steps=14", back, **online(server))
    assert second.returncode == 0, second.stderr
    for trouble in ("is left out", "less than the current step"):
        assert trouble not in first.stderr + second.stderr
    run = place.run("online")

    identity = json.loads((run / "tracking.json").read_text())["wandb"]
    assert list(server.runs) == [identity]
    sent = server.runs[identity]
    assert (sent.project, sent.display_name, sent.exit_codes) == ("frugal-moe", "online", [0, 0])
    recipe = json.loads((run / "config.json").read_text())
    assert {section: sent.config[section]["value"] for section in recipe} == recipe
    assert axes_of(sent) == {
        "train/*": "train/step", "router/*": "train/step", "energy/*": "train/step", "efficiency/*": "train/step",
        "eval/*": "train/tokens", "eval/loss": "train/tokens",
        "train/step": "", "train/tokens": "", "train/device_hours": "", "energy/total_kwh": "",
    }  # fmt: skip

    written = {row["_step"]: row for row in sent.rows}
    assert [row["_step"] for row in sent.rows] == sorted(written), "none twice, and in order"
    wanted = rows_of(run, 1) | rows_of(run, 0)  # of a step that was done twice, the first
    assert sorted(written) == sorted(wanted) == list(range(15))
    for step, row in wanted.items():
        for name, value in row.items():
            assert written[step][name] == pytest.approx(value, rel=1e-6), (step, name)
        assert {"train/tokens", "train/device_hours", "energy/total_kwh"} <= row.keys()

    files = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not [name for name, content in sent.files.items() if KEY.encode() in content]
    assert KEY not in json.dumps(sent.config)


def test_a_key_that_is_refused(place: Tracked, server: Server) -> None:
    """The run goes on without W&B, says so once, and metrics.jsonl has every row."""
    server.key = KEY[::-1]
    done = place.train("run.name=refused", *WORDS, "train.max_steps=6", **online(server))
    assert done.returncode == 0, done.stderr
    assert server.refused
    assert not server.runs
    assert done.stderr.count("tracker wandb is left out from here on (") == 1
    assert "error 401" in done.stderr
    assert "`moe runs track runs/refused --to wandb` sends them again" in done.stderr
    assert sorted(rows_of(place.run("refused"), 0)) == list(range(7))


def test_servers_that_die(place: Tracked, server: Server) -> None:
    """Before the run or within it: it goes on to its end, waits no longer than it says, and metrics.jsonl is whole."""
    dead = Server(KEY)
    dead.close()
    processes = {}
    for name, start_s, finish_s, other in (("before", "3", "1", dead), ("within", "60", "3", server)):
        words = (str(RECIPE.parent), start_s, finish_s, f"run.name={name}", *WORDS, "train.max_steps=30")
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", HURRIED, *words], env=place.environment(**online(other)), cwd=place.folder,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert server.opened.wait(60)
    server.close()
    said = {name: process.communicate(timeout=60)[1] for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, said[name]
        assert f"runs/{name} is complete at step 30" in said[name]
        assert sorted(rows_of(place.run(name), 0)) == list(range(31))
    assert said["before"].count("tracker wandb is left out from here on (") == 1
    assert "connection refused" in said["before"]
    assert said["within"].count("`wandb sync`") == 1
    assert list(place.run("within").glob("wandb/run-*/run-*.wandb"))
