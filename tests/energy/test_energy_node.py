"""Node energy from other tools' files, joined with a run by host and time."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from moe.energy import EnergyMeter, fold_ledgers, read_ledger
from moe.energy.node import node_readings, read_node_file, reconcile
from moe.energy.sources import PmCounters
from moe.errors import ConfigError

from .scribe import Scribe

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
EPOCH = int(START.timestamp())


def at(second: float) -> str:
    return datetime.fromtimestamp(EPOCH + second, UTC).isoformat()


class Clock:
    """Writes ledger lines as if the time of day were START plus seconds after boot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.second = 0.0
        monkeypatch.setattr("moe.energy.ledger.utc_now", lambda: at(self.second))

    def segment(self, path: Path, host: str, start: float, watts: dict[str, float], seconds: int = 100) -> None:
        """One segment with a reading every 10 s of devices at steady power."""
        self.second = start
        scribe = Scribe(path, start, devices=tuple(watts), boot="b", header={"host": host})
        for second in range(0, seconds + 1, 10):
            self.second = start + second
            for uuid, power_w in watts.items():
                scribe.read(self.second, 1000 * power_w * self.second, uuid)
        scribe.end(start + seconds)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def run(tmp_path, clock):
    """100 s of two GPUs, 300 and 500 W, on node1."""
    path = tmp_path / "ledger.jsonl"
    clock.segment(path, "node1.cluster", 0, {"G0": 300, "G1": 500})
    return fold_ledgers([path])


def write(tmp_path: Path, text: str, name: str = "node.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def csv_of(watts: float, seconds: range, host: str = "") -> str:
    column = f",{host}" if host else ""
    return f"utc,watts{',host' if host else ''}\n" + "".join(f"{at(s)},{watts}{column}\n" for s in seconds)


def test_a_power_log_is_joined_by_time_and_contains_the_devices(tmp_path, run):
    """1000 W of node, 800 W of GPUs, 100 s: a fifth is not seen; nothing is added to the run's total."""
    file = write(tmp_path, csv_of(1000, range(-30, 140, 10)))
    result = reconcile(run, read_node_file(file))
    assert (result.source, result.hosts, result.elapsed_s, result.coverage) == ("node:csv", ["node1.cluster"], 100, 1)
    assert (result.node_j, result.device_j, result.unseen_j) == pytest.approx((100_000, 80_000, 20_000))
    assert result.unseen_share == pytest.approx(0.2)
    assert result.edge_j == 0
    assert result.notes == []
    assert run.total.energy_j == 80_000


def test_holes_of_the_node_are_left_out_of_both_sums(tmp_path, run):
    """No readings from 20 to 60 s: coverage 60 %, 60 s of each, the hole named."""
    lines = csv_of(1000, range(0, 110, 10)).splitlines(keepends=True)
    file = write(tmp_path, "".join(line for i, line in enumerate(lines) if i not in (4, 5, 6)))
    result = reconcile(run, read_node_file(file))
    assert (result.coverage, result.longest_gap_s) == pytest.approx((0.6, 40))
    assert (result.node_j, result.device_j) == pytest.approx((60_000, 48_000))
    assert result.notes == ["the node is known for 60.0% of the metered time: both sums are of that time alone"]


def test_a_counter_column_is_differences_and_a_fall_is_a_hole(tmp_path, run):
    """Joules so far; the PDU restarts between 40 and 50 s."""
    counter = [5_000, 15_000, 25_000, 35_000, 45_000, 3_000, 13_000, 23_000, 33_000, 43_000, 53_000]
    rows = [f"{EPOCH + 10 * i},{joules}\n" for i, joules in enumerate(counter)]
    result = reconcile(run, read_node_file(write(tmp_path, "utc,joules\n" + "".join(rows))))
    assert (result.node_j, result.device_j, result.coverage) == pytest.approx((90_000, 72_000, 0.9))


IPMI = """\
{when}

    Instantaneous power reading:                  {watts} Watts
    Minimum during sampling period:                 20 Watts
    Maximum during sampling period:               1400 Watts
    Average power reading over sample period:      220 Watts
    IPMI timestamp:                           {clock}
    Sampling period:                          00000001 Seconds.
    Power reading state is:                   {state}

"""


def test_ipmitools_output_is_read_at_the_time_written_before_it(tmp_path, run):
    """The controller's clock is a day off; a deactivated reading is none."""
    seconds = range(0, 110, 10)
    states = ["deactivated" if s == 50 else "activated" for s in seconds]
    text = "".join(
        IPMI.format(
            when=at(s), watts=0 if state == "deactivated" else 1250, clock="Fri Jan 30 12:00:00 2026", state=state
        )
        for s, state in zip(seconds, states, strict=True)
    )
    result = reconcile(run, read_node_file(write(tmp_path, text)))
    assert (result.source, result.node_j, result.unseen_share) == ("node:ipmi", pytest.approx(125_000), 1 - 0.64)


def test_ipmitools_own_clock_serves_where_it_was_set(tmp_path, run):
    """No time before the outputs: the controller's, in UTC; one that was never set is an error with its mend."""
    clocks = [datetime.fromtimestamp(EPOCH + s, UTC).strftime("%a %b %d %H:%M:%S %Y") for s in (0, 50, 100)]
    text = "".join(IPMI.format(when="", watts=1000, clock=clock, state="activated") for clock in clocks)
    assert reconcile(run, read_node_file(write(tmp_path, text))).node_j == pytest.approx(100_000)
    text = IPMI.format(when="", watts=1000, clock="Thu Jan  1 00:00:00 1970", state="activated")
    with pytest.raises(ConfigError, match=r"line 7: the controller's clock says 'Thu Jan .* print `date -u \+%FT%TZ`"):
        read_node_file(write(tmp_path, text))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"PowerControl": [{"PowerConsumedWatts": 1000}]}, id="Power"),
        pytest.param({"PowerWatts": {"Reading": 1000}, "EnergykWh": {"Reading": 7}}, id="EnvironmentMetrics"),
    ],
)
def test_redfish_objects_are_read_one_after_the_other(tmp_path, run, body):
    text = "\n".join(json.dumps({"utc": at(s), "@odata.type": "#x", **body}) for s in range(0, 110, 10))
    result = reconcile(run, read_node_file(write(tmp_path, text)))
    assert (result.source, result.node_j) == ("node:redfish", pytest.approx(100_000))


def test_redfish_energy_alone_is_a_counter(tmp_path, run):
    objects = [{"utc": at(s), "EnergykWh": {"Reading": 50 + s / 3600}} for s in range(0, 110, 10)]
    assert reconcile(run, read_node_file(write(tmp_path, json.dumps(objects)))).node_j == pytest.approx(100_000)


REDFISH = '{"utc": "2026-01-31T12:00:00Z", %s}'
SACCT = "JobID|Start|End|ConsumedEnergyRaw\n"


def test_slurms_number_is_the_job_not_the_sum_of_its_steps(tmp_path, run):
    """Steps run beside each other on one node; the job's own row counts, shared out by time over the run."""
    energies = {"7": 200_000, "7.batch": 200_000, "7.extern": 200_000, "7.0": 150_000}
    rows = "".join(f"{job}|{EPOCH - 100}|{EPOCH + 100}|{energy}\n" for job, energy in energies.items())
    result = reconcile(run, read_node_file(write(tmp_path, SACCT + rows)))
    assert (result.source, result.node_j, result.edge_j) == ("node:slurm", pytest.approx(100_000), 200_000)
    assert result.notes == ["the node's intervals are long against the run: energy at its ends was shared out by time"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param(SACCT + "7|1|2|0\n7.0|1|2|18446744073709551614\n", "SLURM knows no energy of this job", id="none"),
        pytest.param(SACCT + "7|2026-01-31T12:00:00|2|5\n", "has no zone: run sacct with SLURM_TIME_", id="zone"),
        pytest.param(SACCT + f"7|{EPOCH}|{EPOCH}|5\n", "the job ends before it starts", id="running"),
        pytest.param(SACCT + "7|1|2|5\n8|1|2|5\n", "holds the jobs 7, 8: ask sacct for the run's alone", id="jobs"),
        pytest.param("JobID|ConsumedEnergyRaw\n7|5\n", "has no End, Start", id="columns"),
        pytest.param("utc,watts\n2026-01-31T12:00:00Z,12 W\n", "line 2: watts '12 W' is no number", id="number"),
        pytest.param("utc,watts\nyesterday,12\n", "line 2: 'yesterday' is no time: write 2026-01-31T12", id="time"),
        pytest.param("utc,watts\n12.5,12\n", "line 2: '12.5' is no time a run can have", id="clock"),
        pytest.param("time,watts\n1,2\n", "has no header with utc and watts", id="header"),
        pytest.param("", "has no header with utc and watts", id="empty"),
        pytest.param("utc,watts\n2026-01-31T12:00:00Z,12\n", "fewer than two readings", id="one reading"),
        pytest.param('{"PowerControl": []}', "reading 1 has no utc", id="no utc"),
        pytest.param('{"utc": "2026-01-31T12:00:00Z"}', "tells neither PowerConsumedWatts nor", id="no power"),
        pytest.param(REDFISH % '"PowerControl": {"a": 1}', "PowerControl is no list of objects", id="control object"),
        pytest.param(REDFISH % '"PowerControl": [7]', "PowerControl is no list of objects", id="control number"),
        pytest.param(REDFISH % '"PowerWatts": 7, "host": [1]', "host [1] is no name: give a string", id="host list"),
        pytest.param("utc,watts\n" + "x" * 140_000, "is no CSV (field larger than field limit", id="long field"),
        pytest.param(SACCT + "x" * 140_000, "is no CSV (field larger than field limit", id="long sacct field"),
        pytest.param('{"utc": ', "is no JSON", id="json"),
        pytest.param("[1]", "holds 1: give one JSON object a reading", id="json list"),
        pytest.param("5 J 1769860800000000 us\n6 Joules\n", "line 2: '6 Joules' is no energy", id="pm_counters"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(ConfigError) as caught:
        read_node_file(write(tmp_path, text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_node_is_joined_with_its_own_devices(tmp_path, clock):
    """Two nodes, one file with a host column and another machine in it; names match up to the first dot."""
    clock.segment(tmp_path / "a", "node1.cluster", 0, {"G0": 300})
    clock.segment(tmp_path / "b", "node2.cluster", 0, {"G1": 500})
    run = fold_ledgers([tmp_path / "a", tmp_path / "b"])
    watts = {"NODE1": 400, "node2": 900, "login": 9999}
    rows = "".join(f"{at(s)},{power_w},{host}\n" for s in range(0, 110, 10) for host, power_w in watts.items())
    result = reconcile(run, read_node_file(write(tmp_path, "utc,watts,host\n" + rows)))
    assert result.hosts == ["node1.cluster", "node2.cluster"]
    assert (result.elapsed_s, result.node_j, result.device_j) == pytest.approx((200, 130_000, 80_000))
    with pytest.raises(ConfigError, match="the run used the hosts node1, node2: give each reading its host"):
        reconcile(run, read_node_file(write(tmp_path, csv_of(400, range(0, 110, 10)))))
    rows = f"7|{EPOCH}|{EPOCH + 100}|200000\n"
    whole = reconcile(run, read_node_file(write(tmp_path, SACCT + rows)))
    assert (whole.elapsed_s, whole.node_j, whole.device_j) == pytest.approx((100, 200_000, 80_000))


def test_what_cannot_belong_together_is_refused(tmp_path, run):
    """Another host, another day, and two series of one node at once."""
    with pytest.raises(ConfigError, match="the readings are of login, the run used node1"):
        reconcile(run, read_node_file(write(tmp_path, csv_of(1, range(0, 110, 10), "login"))))
    with pytest.raises(ConfigError, match="no time in common"):
        reconcile(run, read_node_file(write(tmp_path, csv_of(1, range(90_000, 90_100, 10)))))
    series = read_node_file(write(tmp_path, csv_of(1, range(0, 110, 10))))
    with pytest.raises(ConfigError, match="two series tell of one node at the same time"):
        reconcile(run, series + series)


def test_devices_that_used_more_than_their_node_are_pointed_out(tmp_path, run):
    result = reconcile(run, read_node_file(write(tmp_path, csv_of(500, range(0, 110, 10)))))
    assert result.unseen_share < 0
    assert "the devices used more than the node they are in" in result.notes[0]


def test_the_meter_keeps_the_nodes_counter_beside_its_gpus(tmp_path, monkeypatch):
    """Cray's counter, read live at both ends: no device, not in the total, reconciled without a file."""
    monkeypatch.setattr("moe.energy.meter._startup_claimed", True)
    folder = tmp_path / "pm_counters"
    folder.mkdir()
    (folder / "energy").write_text("1000 J\n")
    path = tmp_path / "ledger.jsonl"
    with EnergyMeter(path, ["GPU-x"], declared_power_w=100, node=PmCounters(folder)):
        time.sleep(0.5)
        (folder / "energy").write_text("1200 J\n")
    records = list(read_ledger(path))
    assert records[0]["node_source"] == "node:pm_counters"
    kept = [r["node_energy_mj"] for r in records if "node_energy_mj" in r]
    assert kept == [1_000_000, 1_200_000]
    fold = fold_ledgers([path])
    assert fold.total.scope == "gpu"
    assert fold.total.energy_j < 200
    result = reconcile(fold, node_readings(fold))
    assert (result.source, result.node_j) == ("node:pm_counters", pytest.approx(200, rel=1e-3))
    assert result.device_j == pytest.approx(fold.total.energy_j, rel=1e-3)
    assert result.notes == ["the devices' energy is time x declared power"]


def test_a_capture_of_crays_file_is_read_with_its_own_times(tmp_path, run):
    text = "".join(f"{81_000_000 + 1000 * s} J {(EPOCH + s) * 10**6} us\n" for s in range(0, 110, 10))
    result = reconcile(run, read_node_file(write(tmp_path, text)))
    assert (result.source, result.node_j) == ("node:pm_counters", pytest.approx(100_000))


def test_the_command_prints_both_sums_and_what_no_device_saw(tmp_path, run):
    """Text, JSON, and the sentence where there is nothing to compare with."""
    write(tmp_path, csv_of(1000, range(0, 110, 10)), "pdu.csv")

    def moe(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe.cli", "energy", "node", "ledger.jsonl", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert moe("pdu.csv").stdout == (
        "node:csv, 100 s metered, node known for 100.0%\n"
        "node            100,000.0 J, its devices inside\n"
        "devices          80,000.0 J\n"
        "unseen           20,000.0 J (20.0% of the node)\n"
    )
    assert json.loads(moe("pdu.csv", "--json").stdout)["unseen_share"] == pytest.approx(0.2)
    (tmp_path / "evil.csv").write_text(csv_of(1000, range(0, 110, 10), "\x1b[2Jevil"))
    assert moe("evil.csv").stderr == "moe: the readings are of [2jevil, the run used node1\n"
    done = moe()
    assert (done.returncode, done.stderr) == (
        2,
        "moe: ledger.jsonl holds no readings of its node: give a file of them\n",
    )


def test_a_report_on_the_node_makes_its_footprint_of_the_nodes_energy_alone(tmp_path, run):
    """1000 W of node over 100 s at 360 g/kWh: 10 g. The 80 kJ of GPUs stand beside, and are nowhere added."""
    write(tmp_path, csv_of(1000, range(0, 110, 10)), "pdu.csv")
    hours = "".join(f"{at(s)},{g}\n" for s, g in ((-3550, 200), (50, 600), (3650, 600)))  # changes in the middle
    write(tmp_path, "utc,g_per_kwh\n" + hours, "hours.csv")

    def report(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe.cli", "energy", "report", "ledger.jsonl", *words]
        wide = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=wide)

    told = json.loads(report("--node", "pdu.csv", "--grid", "360", "--price", "2", "--json").stdout)
    numbers = told["footprint"]["numbers"]
    assert (told["total"]["energy_j"], told["total"]["scope"]) == (80_000, "gpu")
    assert (told["node"]["node_j"], told["node"]["device_j"]) == pytest.approx((100_000, 80_000))
    assert (numbers["energy_it"]["scope"], numbers["energy_it"]["source"]) == ("node", "node:csv")
    assert [numbers["carbon_location"][end] for end in ("low", "value", "high")] == pytest.approx([9.5, 10, 10.5])
    assert numbers["cost_devices"]["value"] == pytest.approx(2 * told["total"]["device_hours"])
    joined = json.loads(report("--node", "pdu.csv", "--grid", "hours.csv", "--json").stdout)["footprint"]
    assert joined["numbers"]["carbon_location"]["value"] == pytest.approx(400 / 36)
    text = report("--node", "pdu.csv", "--grid", "360").stdout
    assert "footprint, node" in text
    assert "footprint, gpu" not in text
    assert "devices over that time" in text
    done = report("--node", "kept")
    assert done.stderr == "moe: ledger.jsonl holds no readings of its node: give a file of them\n"


def test_a_node_without_readings_is_named_and_lowers_the_coverage(tmp_path, clock):
    """Two nodes, readings of one: half of the metered time is known, and its sums are of that node alone."""
    clock.segment(tmp_path / "ledger.jsonl", "a", 0, {"G0": 300})
    clock.segment(tmp_path / "ledger.node1.jsonl", "b", 0, {"G1": 300})
    fold = fold_ledgers([tmp_path / "ledger.jsonl", tmp_path / "ledger.node1.jsonl"])
    rows = "".join(f"{at(s)},400,a\n" for s in range(0, 110, 10))
    result = reconcile(fold, read_node_file(write(tmp_path, "utc,watts,host\n" + rows)))
    assert (result.coverage, result.node_j, result.device_j) == pytest.approx((0.5, 40_000, 30_000))
    assert result.notes[0] == "no readings of b: what it used is in neither sum"


def test_the_band_of_a_node_holds_what_was_shared_out_by_time(tmp_path, run):
    """A job of 1000 s and 1 MJ around a run of 100 s: its tenth is shared out, between nothing and two tenths."""
    rows = f"7|{EPOCH - 450}|{EPOCH + 550}|1000000\n"
    result = reconcile(run, read_node_file(write(tmp_path, SACCT + rows)))
    assert (result.node_j, result.band_j) == pytest.approx((100_000, 105_000))
    assert result.pieces[0].energy_j == pytest.approx(100_000)
