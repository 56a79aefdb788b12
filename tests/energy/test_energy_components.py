"""Energy by component: the time of split steps, the joules of the phases they belong to, exact to the millijoule."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe.cli.energy import app
from moe.energy.components import share_steps
from moe.energy.totals import PhaseTotal

from .scribe import Scribe

STEP = {"data": 0.1, "attention": 0.3, "experts": 0.5, "head": 0.2, "optimizer": 0.1, "other": 0.05, "idle": 0.05}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 10 s at 100.007 W: 2 s of evaluation, 8 s of steps, two of which were split."""
    folder = tmp_path / "run"
    folder.mkdir()
    scribe = Scribe(folder / "ledger.jsonl", 0)
    scribe.read(0, 0)
    scribe.mark(10, step=4, tokens=400, evaluation=2.0, data=0.5, forward_backward=6.0, optimizer=1.5)
    scribe.read(10, 1_000_070)
    scribe.end(10)
    rows = [{"resumed_step": 0, "train/step": 0}]
    for step, factor in ((1, None), (2, 1.0), (3, None), (4, 3.0)):
        split = {} if factor is None else {f"efficiency/step_s/{name}": factor * s for name, s in STEP.items()}
        rows.append({"train/step": step, "efficiency/step_s/idle": 0.0, **split})
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"segment": 0, **row}) + "\n" for row in rows))
    return folder


def report(*words: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_components_sum_to_the_phases_of_steps(run: Path) -> None:
    """Shares are those of the time, the sum is data + forward_backward + optimizer to the last millijoule."""
    told = json.loads(report(run, "--json"))
    assert told["components"]["apportioned_by"] == "time"
    assert told["components"]["num_steps"] == 2
    parts = told["components"]["parts"]
    of_steps_j = sum(told["phases"][name]["energy_j"] for name in told["components"]["of_phases"])
    assert round(1000 * sum(part["energy_j"] for part in parts.values())) == round(1000 * of_steps_j) == 800_056
    assert parts["experts"]["energy_j"] == pytest.approx(of_steps_j * 0.5 / sum(STEP.values()), abs=0.001)
    assert parts["experts"]["step_s"] == pytest.approx(1.0)  # the mean of 0.5 and 1.5


def test_components_are_printed_and_say_how_they_were_found(run: Path) -> None:
    """The label stands in the table; held and useful are there for time and for energy."""
    text = report(run)
    assert "apportioned by time" in " ".join(text.split())
    assert "experts" in text
    assert "device-hours held 0.00277778, of them useful 0.00222222" in text
    assert "energy 1,000.1 J, of it useful 800.1 J" in text


def test_without_a_split_step_there_are_no_components(run: Path) -> None:
    """A ledger alone, and a run without metrics, are reported as before."""
    assert json.loads(report(run / "ledger.jsonl", "--json"))["components"] == {}
    (run / "metrics.jsonl").unlink()
    assert json.loads(report(run, "--json"))["components"] == {}
    assert "component" not in report(run)


def test_nothing_is_lost_to_rounding() -> None:
    """Seven parts of a number that seven does not divide."""
    parts = share_steps({"data": PhaseTotal(100, 1.0), "idle": PhaseTotal(7, 1.0)}, dict.fromkeys("abcdefg", 1.0))
    assert sum(parts.values()) == 100
    assert set(parts.values()) == {14, 15}


@pytest.mark.parametrize("words", [(), ("--json",)], ids=["text", "json"])
def test_damaged_metrics_cost_the_components_and_not_the_report(run: Path, words: tuple[str, ...]) -> None:
    """The ledger is whole: the report is made, and one sentence says what it lacks and why."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 3}\n')
    result = CliRunner().invoke(app, ["report", str(run), *words])
    assert result.exit_code == 0, result.output
    said = " ".join((result.stderr if words else result.stdout).split())
    assert "components are left out: " in said
    assert "line 6 has no segment or train/step" in said
    if words:
        told = json.loads(result.stdout)
        assert (told["components"], told["total"]["energy_mj"]) == ({}, 1_000_070)


@pytest.mark.parametrize("value", [None, "0.5", [0.5], float("nan"), float("inf"), -0.5])
def test_a_split_that_is_not_all_times_does_not_count(run: Path, value: object) -> None:
    """The other split alone gives the shares: a part of a step would shift them."""
    write(run, 4, {f"efficiency/step_s/{name}": s for name, s in STEP.items()} | {"efficiency/step_s/experts": value})
    components = json.loads(report(run, "--json"))["components"]
    assert components["num_steps"] == 1
    assert components["parts"]["experts"]["step_s"] == 0.5


def test_components_that_took_no_time_have_no_shares(run: Path) -> None:
    """A split of zeros is no split, printed and as JSON."""
    for step in (2, 4):
        write(run, step, {f"efficiency/step_s/{name}": 0.0 for name in STEP})
    assert json.loads(report(run, "--json"))["components"] == {}
    assert "apportioned by time" not in " ".join(report(run).split())


def write(run: Path, step: int, values: dict[str, object]) -> None:
    """Put values into the metrics' row of a step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row | values if row["train/step"] == step else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
