"""What a programme of runs cost, on ledgers written by hand: every joule is known, and counted once."""

import json
import os
import random
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from moe.energy import fold_ledgers
from moe.energy.cut import cut_ledger
from moe.energy.programme import RunLedgers, fold_programme
from moe.energy.spending import Programme
from moe.energy.supervise import purpose_of

from .scribe import Scribe

BOOT = datetime(2025, 1, 1, 22, tzinfo=UTC)  # two hours before midnight
STEP_S = {"data": 0.1, "forward_backward": 0.8, "optimizer": 0.1}


class Segment:
    """One segment of `ledger`, on a device that steadily uses `power_w`; its readings are one second apart."""

    def __init__(
        self,
        ledger: Path,
        start_s: int,
        *,
        pid: int = 1,
        device: str = "GPU-a",
        power_w: float = 500,
        metered_by: str | None = None,
        **options,
    ):
        ledger.parent.mkdir(exist_ok=True, parents=True)
        self.power_mw, self.device = round(power_w * 1000), device
        self.at_s, self.step = start_s, options.get("resumed", 0)
        header = {"pid": pid} | ({"metered_by": metered_by} if metered_by else {})
        self.scribe = Scribe(ledger, start_s, devices=(device,), booted=BOOT, header=header, tick_s=0.0, **options)
        self._read()

    def _read(self) -> None:
        self.scribe.read(self.at_s, self.power_mw * self.at_s, self.device)

    def spend(self, seconds: int, phase: str = "command") -> "Segment":
        """`seconds` in one phase."""
        for _ in range(seconds):
            self.at_s += 1
            self._read()
            self.scribe.mark(self.at_s, **{phase: 1.0})
        return self

    def train(self, steps: int) -> "Segment":
        """Steps of one second: a tenth data, eight forward and backward, a tenth the optimizer."""
        for _ in range(steps):
            self.at_s, self.step = self.at_s + 1, self.step + 1
            self._read()
            self.scribe.mark(self.at_s, self.step, **STEP_S)
        return self

    def end(self) -> None:
        self.scribe.end(self.at_s)

    def die(self) -> None:
        self.scribe.close()


def total(*folders: Path, trunks: dict[str, str] | None = None) -> Programme:
    runs = [RunLedgers(f.name, (f / "ledger.jsonl",), (trunks or {}).get(f.name)) for f in folders]
    return fold_programme(runs)


def energies(programme: Programme) -> dict[str, int]:
    """Measured millijoules by purpose; they and the days' must sum to the total."""
    half = programme.measured
    purposes = {name: spent.energy_mj for name, spent in half.by_purpose.items() if spent.energy_mj}
    for parts in (half.by_purpose, half.by_day):
        assert sum(spent.energy_mj for spent in parts.values()) == (half.energy_mj or 0)
        held_ns = sum(spent.device_ns for spent in parts.values())
        assert held_ns / 3.6e12 == pytest.approx(half.basis.device_hours, rel=1e-12)
    assert sum(run.measured.energy_mj for run in programme.runs) == (half.energy_mj or 0)
    return purposes


def test_every_purpose_to_the_millijoule(tmp_path):
    """Start-up, steps, evaluation and checkpoints of a run; a metered command; an evaluation in phases of its own."""
    Segment(tmp_path / "a/ledger.jsonl", 0).spend(3, "idle").train(10).spend(2, "evaluation").spend(
        1, "checkpoint"
    ).end()
    Segment(tmp_path / "b/ledger.jsonl", 100, pid=2).spend(7).end()
    programme = total(tmp_path / "a", tmp_path / "b")
    assert energies(programme) == {
        "startup_and_idle": 1_500_000,
        "training": 4_500_000,
        "data": 500_000,
        "evaluation": 1_000_000,
        "checkpoints": 500_000,
        "other_programs": 3_500_000,
    }
    assert programme.measured.basis.device_hours == 23 / 3600
    assert programme.measured.basis.band_j == pytest.approx(0.05 * 11_500)
    assert (programme.estimated.energy_mj, programme.recognised, programme.unreadable) == (None, [], [])


def test_a_killed_run_and_what_its_restart_did_again(tmp_path):
    """Killed after step 6, resumed from step 4: two steps are lost, and the joules up to the restart unattributed."""
    Segment(tmp_path / "a/ledger.jsonl", 0).train(6).die()
    Segment(tmp_path / "a/ledger.jsonl", 8, pid=2, resumed=4).train(4).end()
    programme = total(tmp_path / "a")
    lost = {"training": 3_600_000, "data": 400_000, "lost_to_restarts": 1_000_000, "unattributed": 1_000_000}
    assert energies_without_time(programme) == lost
    assert programme.measured.energy_mj == fold_ledgers([tmp_path / "a/ledger.jsonl"]).total.energy_mj == 6_000_000


def test_what_a_kill_lost_counts_though_the_next_process_read_nothing(tmp_path):
    """Killed at 6 s, once more as soon as its segment line was written, gone on at 8 s: one second's joules, once."""
    ledger = tmp_path / "a/ledger.jsonl"
    Segment(ledger, 0).train(6).die()
    Segment(ledger, 7, pid=2, resumed=6).die()
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    Segment(ledger, 8, pid=3, resumed=6).train(4).end()
    programme = total(tmp_path / "a")
    assert energies_without_time(programme) == {"training": 4_500_000, "data": 500_000, "unattributed": 1_000_000}
    assert programme.measured.energy_mj == fold_ledgers([ledger]).total.energy_mj


def energies_without_time(programme: Programme) -> dict[str, int]:
    return {name: spent.energy_mj for name, spent in programme.measured.by_purpose.items() if spent.energy_mj}


def test_a_day_ends_at_midnight_utc(tmp_path):
    """22:00 plus 7195 s to 7205 s: five seconds of each day."""
    Segment(tmp_path / "a/ledger.jsonl", 7195).spend(10).end()
    days = total(tmp_path / "a").measured.by_day
    assert {day: (spent.energy_mj, spent.device_ns) for day, spent in days.items()} == {
        "2025-01-01": (2_500_000, 5 * 10**9),
        "2025-01-02": (2_500_000, 5 * 10**9),
    }


def test_a_trunk_and_its_branches(tmp_path):
    """Three branches share the trunk's steps up to where each left it; with and without the trunk they count once."""
    ledger = tmp_path / "trunk/ledger.jsonl"
    Segment(ledger, 0).train(10).die()
    Segment(ledger, 11, pid=2, resumed=10).train(10).end()
    trunks = {}
    for number, at in enumerate((12, 15, 15)):
        name = f"b{number}"
        trunks[name] = "trunk"
        (tmp_path / name).mkdir()
        cut_ledger(
            ledger, tmp_path / name / "ledger.jsonl", lambda line, at=at: (line.get("step") or 0) <= at, "branched"
        )
        Segment(tmp_path / name / "ledger.jsonl", 100 * (number + 1), pid=10 + number, resumed=at).train(3).end()
    folders = [tmp_path / name for name in trunks]
    programme = total(tmp_path / "trunk", *folders, trunks=trunks)
    assert sum(energies(programme).values()) == (20 + 1 + 3 * 3) * 500_000
    assert [run.measured.energy_mj for run in programme.runs] == [21 * 500_000, *[3 * 500_000] * 3]
    assert programme.recognised[0].startswith("b0 is a branch of trunk: the 6,500.000 J")
    alone = total(*folders, trunks=trunks)
    assert (
        sum(energies(alone).values()) == (15 + 1 + 3 * 3) * 500_000 + 1 * 500_000
    )  # step 16's reading, before its mark
    assert all(sentence.split(":")[0].endswith("are branches of trunk") for sentence in alone.recognised)


def test_copies_count_once_and_differ_from_where_they_differ(tmp_path):
    """A folder copied while the run went on, and resumed there: the joules before the copy are the same ones."""
    one, other = tmp_path / "one/ledger.jsonl", tmp_path / "other/ledger.jsonl"
    segment = Segment(one, 0).train(5)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    segment.train(5).end()
    Segment(other, 20, pid=3, resumed=5).train(2).end()
    programme = total(tmp_path / "other", tmp_path / "one")
    assert energies_without_time(programme) == {"training": 12 * 450_000, "data": 12 * 50_000}
    assert programme.recognised[0].startswith("other holds segments of one too: the 2,500.000 J")


def test_an_outdated_copy_tells_nothing_new(tmp_path):
    """Copied after any line, before or after the restart that threw two steps away; in either order."""
    Segment(tmp_path / "a/ledger.jsonl", 0).train(6).die()
    Segment(tmp_path / "a/ledger.jsonl", 8, pid=2, resumed=4).train(4).end()
    alone = total(tmp_path / "a").measured
    lines = (tmp_path / "a/ledger.jsonl").read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines) + 1):
        copy = tmp_path / f"copy-{number}"
        copy.mkdir()
        (copy / "ledger.jsonl").write_bytes(b"".join(lines[:number]))
        for folders in ((tmp_path / "a", copy), (copy, tmp_path / "a")):
            both = total(*folders).measured
            assert (both.by_purpose, both.by_day, both.basis.band_j) == (
                alone.by_purpose, alone.by_day, alone.basis.band_j,
            )  # fmt: skip


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_metered_child_counts_once_and_keeps_its_purposes(tmp_path, outer_first):
    """`moe energy run -- train`: the total is the outer ledger's to the millijoule; the child says what for."""
    outer, child = tmp_path / "outer/ledger.jsonl", tmp_path / "child/ledger.jsonl"
    Segment(outer, 0).spend(20).end()
    Segment(child, 3, pid=2, metered_by="/gone/ledger.jsonl").spend(2, "idle").train(10).end()
    folders = [outer.parent, child.parent][:: 1 if outer_first else -1]
    programme = total(*folders)
    assert energies(programme) == {
        "other_programs": 8 * 500_000, "startup_and_idle": 2 * 500_000, "training": 4_500_000, "data": 500_000,
    }  # fmt: skip
    assert programme.measured.energy_mj == fold_ledgers([outer]).total.energy_mj
    assert {run.name: run.measured.energy_mj for run in programme.runs} == {"outer": 4_000_000, "child": 6_000_000}
    assert programme.recognised == ["child was metered from outside by outer: its 6,000.000 J are not counted again"]
    assert total(child.parent).measured.energy_mj == 6_000_000


def test_two_meters_on_one_device_overlapping(tmp_path):
    """Each moment of a device counts once, whoever read it; another boot and another device count for themselves."""
    Segment(tmp_path / "a/ledger.jsonl", 0).spend(10).end()
    Segment(tmp_path / "b/ledger.jsonl", 6, pid=2).spend(10).end()
    Segment(tmp_path / "c/ledger.jsonl", 0, pid=3, boot="next").spend(10).end()
    Segment(tmp_path / "d/ledger.jsonl", 0, pid=4, device="GPU-b").spend(10).end()
    programme = total(*(tmp_path / name for name in "abcd"))
    assert energies(programme) == {"other_programs": (16 + 10 + 10) * 500_000}
    assert programme.recognised == ["b read a device at the same time as a: its 2,000.000 J are not counted again"]


def test_estimates_stand_beside_measurements(tmp_path):
    """Two totals and their scopes; where a device was measured, an estimate of the same time counts nothing."""
    Segment(tmp_path / "a/ledger.jsonl", 0).spend(10).end()
    host = {"device": "CPU-x", "kind": "cpu", "scope": "node", "source": "estimate:tdp"}
    Segment(tmp_path / "b/ledger.jsonl", 0, pid=2, **host).spend(10).end()
    Segment(tmp_path / "c/ledger.jsonl", 5, pid=3, source="declared", power_w=900).spend(10).end()
    programme = total(tmp_path / "c", tmp_path / "b", tmp_path / "a")
    assert (programme.measured.energy_mj, programme.measured.basis.scope) == (5_000_000, "gpu")
    assert programme.estimated.energy_mj == 10 * 500_000 + 5 * 900_000
    assert programme.estimated.by_scope == {"gpu": 4_500_000, "node": 5_000_000}
    assert programme.measured.basis.measured
    assert not programme.estimated.basis.measured


def test_the_union_is_the_sum_less_what_is_shared(tmp_path):
    """Over random programmes: total(A u B) = total(A) + total(B) - total(A n B), in any order, to the millijoule."""
    chance = random.Random(7)
    for case in range(20):
        runs, start = [], 0
        for number in range(6):
            folder = tmp_path / f"{case}-{number}"
            power_w = chance.randint(1, 700) / 7
            for segment in range(chance.randint(1, 3)):
                made = Segment(folder / "ledger.jsonl", start, pid=100 * number + segment, power_w=power_w)
                made.spend(chance.randint(0, 3), "idle").train(chance.randint(0, 4))
                chance.choice((made.end, made.die))()
                start = made.at_s + chance.randint(1, 5)
            runs.append(folder)
        ours, theirs = chance.sample(runs, 4), chance.sample(runs, 3)
        copied = [tmp_path / "copies" / run.name for run in theirs]
        for run, copy in zip(theirs, copied, strict=True):
            shutil.copytree(run, copy)
        both, a, b = total(*ours, *copied), total(*ours), total(*copied)
        shared = total(*(run for run in ours if run in theirs))
        for name in ("energy_mj", "device_ns"):
            whole, one, other, common = (
                sum(getattr(spent, name) for spent in programme.measured.by_purpose.values())
                for programme in (both, a, b, shared)
            )
            assert whole == one + other - common
        chance.shuffle(ours)
        again = total(*copied, *ours)
        assert again.measured.energy_mj == both.measured.energy_mj
        assert {d: s.energy_mj for d, s in again.measured.by_day.items()} == {
            d: s.energy_mj for d, s in both.measured.by_day.items()
        }


@pytest.fixture
def moe_total(tmp_path):
    """`moe energy total WORDS…`, in the folder of the test."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe.cli", "energy", "total", *words]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)

    return call


def test_the_command_counts_what_several_paths_lead_to_once(moe_total, tmp_path):
    """A folder, a run in it, a link to it and a ledger file; a failed run counts; the footprint follows the options."""
    Segment(tmp_path / "runs/a/ledger.jsonl", 0).train(10).end()
    Segment(tmp_path / "runs/failed/ledger.jsonl", 50, pid=2).train(3).die()
    Segment(tmp_path / "energy-runs/x/ledger.jsonl", 100, pid=3).spend(7).end()
    (tmp_path / "link").symlink_to("runs/a")
    paths = ("runs", "energy-runs", "runs/a", "link", "runs/a/ledger.jsonl")
    done = moe_total(*paths, "--json", "--grid", "360", "--pue", "2", "--price", "3600")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["measured"]["energy_j"] == 10_000
    assert [run["ended"] for run in said["runs"]] == ["stopped", "lost", "stopped"]
    assert len(said["recognised"]) == 3
    numbers = said["measured"]["footprint"]["numbers"]
    assert numbers["carbon_location"]["value"] == pytest.approx(2.0)
    assert numbers["cost_devices"]["value"] == pytest.approx(20)
    assert said["estimated"]["energy_j"] is None
    text = moe_total(*paths).stdout
    for word in ("training", "other programs", "2025-01-01", "lost", "is given again", "measured"):
        assert word in text


def test_a_damaged_ledger_is_named_and_the_others_are_summed(moe_total, tmp_path):
    """The exit code says that the total is not the whole one."""
    Segment(tmp_path / "runs/a/ledger.jsonl", 0).train(10).end()
    Segment(tmp_path / "runs/b/ledger.jsonl", 50, pid=2).train(3).end()
    text = (tmp_path / "runs/b/ledger.jsonl").read_text()
    (tmp_path / "runs/b/ledger.jsonl").write_text(text.replace('"step":2', '"step":3'))
    done = moe_total("runs", "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["measured"]["energy_j"]) == (2, 5000)
    assert "ledger runs/b/ledger.jsonl was altered" in said["unreadable"][0]
    assert done.stderr == f"moe: {said['unreadable'][0]} (it is in no total)\n"
    done = moe_total("nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moe: nowhere is no ledger and holds none: give run directories, or folders of them\n"


def test_data_preparation_under_the_outer_meter_is_for_data(tmp_path):
    """`moe data prepare` is known by its name; what another program is for can be said; the rest is other programs."""
    text = tmp_path / "text.txt"
    text.write_text("one two three\n\n" * 500)

    def energy(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe.cli", "energy", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    prepare = [sys.executable, "-m", "moe.cli", "data", "prepare", str(text), "--out", "shards", "--vocab-size", "260"]
    assert energy("run", "--out", "a", "--power", "100", "--", *prepare).returncode == 0
    for out, *words in (("b", "--purpose", "evaluation"), ("c",)):
        assert energy("run", "--out", out, "--power", "100", *words, "--", "sleep", "0.2").returncode == 0
    half = json.loads(energy("total", ".", "--json").stdout)["estimated"]
    assert half["purposes"].keys() == {"data", "evaluation", "other_programs", "startup_and_idle"}
    spent = {name: part["energy_j"] for name, part in half["purposes"].items()}
    phases = fold_ledgers([tmp_path / "a/ledger.jsonl"]).phases
    assert spent["data"] == pytest.approx(phases["data_preparation"].energy_j)
    assert sum(spent.values()) == pytest.approx(half["energy_j"])
    assert energy("run", "--purpose", "fun", "--", "true").returncode == 2


@pytest.mark.parametrize(
    ("command", "purpose"),
    [
        ("moe data prepare text --out x", "data"),
        ("srun -n1 /opt/bin/moe data prepare text", "data"),
        ("python -m moe.cli data prepare text", "data"),
        ("moe generate runs/data prepare", "other"),
        ("python prepare.py data prepare", "other"),
    ],
)
def test_our_own_preparation_is_known_however_it_is_launched(command, purpose):
    assert purpose_of(command.split()) == purpose
