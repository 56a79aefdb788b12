"""`moe energy run` and `moe energy report`, as processes on a fake node."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.energy import fold_ledgers, read_ledger
from moe.energy.ledger import LedgerWriter

MOE = [sys.executable, "-m", "moe.cli", "energy"]


@pytest.fixture
def moe(tmp_path):
    """Run `moe energy …` in an empty folder, without GPUs; returns the finished process."""

    def call(*words: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*MOE, *words], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60, stdin=subprocess.DEVNULL
        )

    return call


def ledger_of(folder: Path) -> Path:
    (path,) = folder.glob("energy-runs/*/ledger.jsonl")
    return path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for nobody in particular does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("code", [0, 7])
def test_the_commands_exit_code_and_output_come_back(moe, tmp_path, code):
    """Standard output is the command's alone; the summary goes to stderr; the ledger has a place of its own."""
    done = moe("run", "--", "sh", "-c", f"echo hello; exit {code}")
    assert done.returncode == code
    assert done.stdout == "hello\n"
    assert "source estimate:tdp, scope node" in done.stderr
    assert "energy is time x declared power" in done.stderr
    fold = fold_ledgers([ledger_of(tmp_path)])
    assert fold.segments[0].ended == "end"
    assert fold.phases["command"].elapsed_s > 0


def test_options_after_the_program_are_the_programs(moe):
    """Without `--` too, everything from the program's name on is passed as it stands."""
    done = moe("run", "--power", "50", "echo", "--out", "x", "--json")
    assert (done.returncode, done.stdout) == (0, "--out x --json\n")
    assert "source declared" in done.stderr


@pytest.mark.parametrize("name", ["no-such-program", "./notes.txt"])
def test_a_program_that_cannot_run_is_one_sentence(moe, tmp_path, name):
    """Exit code 2, no traceback, no ledger left behind."""
    (tmp_path / "notes.txt").write_text("not executable")
    done = moe("run", "--", name)
    assert done.returncode == 2
    assert done.stderr == f"moe: {name}: program not found, or not executable: check the name or give its path\n"
    assert not (tmp_path / "energy-runs").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_program(tmp_path, signum):
    """The program's own handler runs and decides; the ledger is ended."""
    code = f"""
import signal, sys, time
signal.signal({int(signum)}, lambda *_: sys.exit(33))
print("up", flush=True)
time.sleep(30)
"""
    command = [*MOE, "run", "--out", "r", "--", sys.executable, "-c", code]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **streams) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signum)
        process.communicate(timeout=20)
    assert process.returncode == 33
    assert fold_ledgers([tmp_path / "r" / "ledger.jsonl"]).segments[0].ended == "end"


def test_a_signal_that_another_thread_was_picked_for_reaches_the_program_in_a_second(tmp_path):
    """Python runs handlers in the main thread alone, which waits for the program: it must not wait for ever."""
    child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(33)); "
    child += "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]); print('up', flush=True); time.sleep(30)"
    code = f"""
import os, signal, sys, threading, time
from pathlib import Path
from moe.energy.sources import EstimateSource
from moe.energy.supervise import run_metered
def send():
    while not Path("up").exists() or not Path("up").read_text():
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=send).start()  # the one thread that does not block the signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
out = os.dup2(os.open("up", os.O_WRONLY | os.O_CREAT), 1)
print(run_metered([sys.executable, "-c", {child!r}], Path("ledger.jsonl"), [EstimateSource(9.0)]), file=sys.stderr)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == "33\n"
    assert time.monotonic() - start < 20


def test_a_program_killed_by_a_signal_gives_128_plus_n(moe, tmp_path):
    done = moe("run", "--out", "r", "--", "sh", "-c", "kill -9 $$")
    assert done.returncode == 128 + signal.SIGKILL
    assert fold_ledgers([tmp_path / "r" / "ledger.jsonl"]).segments[0].ended == "end"


def test_killing_the_meter_itself_leaves_a_ledger_that_folds(node, gpu, tmp_path, wait_until):
    """SIGKILL to `moe energy run`: the lines written so far are whole, the segment is told as lost."""
    ledger = tmp_path / "r" / "ledger.jsonl"
    command = [*MOE, "run", "--out", str(tmp_path / "r"), "--", "sleep", "60"]
    with subprocess.Popen(command, env=node.env, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        wait_until(lambda: ledger.exists() and ledger.read_text().count('"kind":"reading"') >= 3)
        process.kill()
        process.wait()
        os.killpg(process.pid, signal.SIGKILL)  # the program itself, which nobody ends now
    fold = fold_ledgers([ledger])
    assert fold.segments[0].ended == "lost"
    known = [record for record in read_ledger(ledger) if record["kind"] == "reading"]
    assert fold.total.energy_mj == known[-1]["energy_mj"] - known[0]["energy_mj"] >= 400_000


def test_the_visible_gpus_are_metered_and_the_child_finds_the_ledger(node, gpu, tmp_path):
    """Only the GPU CUDA_VISIBLE_DEVICES names is billed; 500 W for two seconds, to within a tick."""
    node.set(gpu, uuid="GPU-other", bus=9)
    env = {**node.env, "CUDA_VISIBLE_DEVICES": "0"}
    command = [*MOE, "run", "--out", "r", "--", "sh", "-c", "echo $MOE_LEDGER; sleep 2"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'r' / 'ledger.jsonl'}\n"
    assert "source counter, scope gpu" in done.stderr
    assert "declared power" not in done.stderr
    fold = fold_ledgers([tmp_path / "r" / "ledger.jsonl"])
    assert [device.uuid for device in fold.devices] == [gpu.uuid]
    first, *_, last = [r for r in read_ledger(tmp_path / "r" / "ledger.jsonl") if r["kind"] == "reading"]
    metered_s = (last["boottime_ns"] - first["boottime_ns"]) / 1e9
    assert metered_s > 2
    assert fold.total.energy_j == pytest.approx(500 * metered_s, abs=50 + 10)


def test_devices_can_be_chosen(node, gpu, tmp_path):
    """--devices takes UUID beginnings or `host`; one that names no GPU is an error."""
    for selection, expected in (("GPU-aaaa", "source counter"), ("host", "source estimate:tdp")):
        command = [*MOE, "run", "--devices", selection, "--", "true"]
        done = subprocess.run(command, cwd=tmp_path, env=node.env, capture_output=True, text=True)
        assert expected in done.stderr
    command = [*MOE, "run", "--devices", "GPU-zzzz", "--", "true"]
    done = subprocess.run(command, cwd=tmp_path, env=node.env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("moe: --devices GPU-zzzz names no GPU of this machine: see `nvidia-smi -L`, or say host\n")


def test_the_report_as_json(moe, tmp_path):
    """The contract's keys and nothing on stdout but JSON; no price unless one is given, and no place is guessed."""
    moe("run", "--out", "r", "--power", "1000", "--", "sleep", "1")
    report = json.loads(moe("report", "r", "--json").stdout)
    assert list(report) == ["total", "devices", "phases", "per_step", "footprint", "segments", "components"]
    assert list(report["footprint"]["numbers"]) == ["energy_it", "carbon_location"]
    assert report["footprint"]["numbers"]["carbon_location"]["value"] is None
    total = report["total"]
    assert total["energy_j"] == pytest.approx(1000 * report["phases"]["command"]["elapsed_s"], rel=0.1)
    assert sum(phase["energy_j"] for phase in report["phases"].values()) == pytest.approx(total["energy_j"], abs=1e-6)
    priced = json.loads(moe("report", "r/ledger.jsonl", "--json", "--grid", "360", "--price", "3600").stdout)
    numbers = priced["footprint"]["numbers"]
    assert numbers["carbon_location"]["value"] == pytest.approx(total["energy_j"] / 1e4)
    assert numbers["cost_devices"]["value"] == pytest.approx(total["device_hours"] * 3600)
    assert "energy_facility" not in numbers


def test_the_report_as_text_names_source_scope_and_band(moe):
    """Every number with where it comes from; an estimate says the agreed words."""
    moe("run", "--out", "r", "--", "true")
    text = moe("report", "r", env={**os.environ, "COLUMNS": "160"}).stdout
    for word in ("±", "estimate:tdp", "node", "coverage", "unattributed", "energy is time x declared power"):
        assert word in text


def test_a_run_directory_folds_all_its_nodes(moe, tmp_path):
    """ledger.jsonl and ledger.nodeN.jsonl are one run; a file that is merely called alike is no part of it."""
    moe("run", "--out", "a", "--power", "100", "--", "sleep", "0.3")
    moe("run", "--out", "b", "--power", "100", "--", "sleep", "0.3")
    one, other = (json.loads(moe("report", name, "--json").stdout)["total"]["device_hours"] for name in "ab")
    (tmp_path / "b" / "ledger.jsonl").rename(tmp_path / "a" / "ledger.node1.jsonl")
    (tmp_path / "a" / "ledger.nodeX.jsonl").write_text("notes")
    both = json.loads(moe("report", "a", "--json").stdout)
    assert both["total"]["device_hours"] == pytest.approx(one + other)
    assert len(both["segments"]) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(["nowhere"], "nowhere is neither a run directory nor a ledger file: check the path", id="nothing"),
        pytest.param(["."], ". holds no ledger.jsonl: give the folder of a metered run", id="no ledger"),
        pytest.param(["notes.txt"], "ledger notes.txt is empty: the run stopped before its first line", id="empty"),
        pytest.param(
            ["bad"],
            "ledger bad/ledger.jsonl line 1 is not a ledger record: "
            "restore it from a copy, or move it away: the cost so far is then not counted",
            id="bad",
        ),
    ],
)
def test_a_report_that_cannot_be_made_is_one_sentence(moe, tmp_path, words, sentence):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "ledger.jsonl").write_text("{}\n{}\n")
    done = moe("report", *words)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"moe: {sentence}\n", "")


def test_the_command_line_starts_in_half_a_second(moe):
    """In processor time and the best of five, so that a busy machine does not fail a quick program."""
    moe("run", "--out", "r", "--", "true")

    def spent_s(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert moe(*words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    light = (
        ["--help"],
        ["run", "--help"],
        ["report", "r", "--json"],
        ["total", "r"],
        ["card", "r"],
        ["prometheus", "r"],
    )
    for words in light:
        assert any(spent_s(*words) < 0.5 for _ in range(5))


def test_a_ledger_cannot_steer_the_terminal_of_who_reads_it(moe, tmp_path):
    """A device name with escape codes and markup is shown, not obeyed."""
    moe("run", "--out", "r", "--power", "1", "--", "true")
    ledger = tmp_path / "r" / "ledger.jsonl"
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    ledger.unlink()
    writer = LedgerWriter(ledger)
    records[0]["devices"][0]["name"] = "\x1b[2J[bold]evil[/bold]"
    for record in records:
        fields = {name: record[name] for name in record.keys() - {"v", "kind", "segment", "seq", "utc", "prev"}}
        writer.append(record["kind"], at_ns=fields.pop("boottime_ns"), **fields)
    writer.close()
    text = moe("report", "r", env={**os.environ, "COLUMNS": "200"}).stdout
    assert "\x1b" not in text
    assert "\N{REPLACEMENT CHARACTER}[2J[bold]evil[/bold]" in text


def test_a_program_that_ignores_sigterm_goes_on_and_is_metered_to_its_end(tmp_path):
    """The meter neither kills what asked to live nor leaves it unbilled."""
    code = """
import signal, time
asked = []  # a handler may neither print nor lock: the program may be just there
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("up", flush=True)
while not asked:
    time.sleep(0.05)
print("asked", flush=True)
time.sleep(1.5)
"""
    command = [*MOE, "run", "--out", "r", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.readline() == "asked\n"
        assert process.poll() is None
        process.communicate(timeout=20)
    assert process.returncode == 0
    segment = fold_ledgers([tmp_path / "r" / "ledger.jsonl"]).segments[0]
    assert (segment.ended, segment.elapsed_s > 1.5) == ("end", True)


def test_what_a_program_leaves_running_does_not_keep_the_meter(moe, tmp_path):
    """A daemon's parent ends, and so does the segment: the meter waits for the program it started alone."""
    done = moe("run", "--out", "r", "--", "sh", "-c", "setsid sleep 30 >/dev/null 2>&1 & echo $!")
    os.kill(int(done.stdout), signal.SIGKILL)
    assert done.returncode == 0
    segment = fold_ledgers([tmp_path / "r" / "ledger.jsonl"]).segments[0]
    assert (segment.ended, segment.elapsed_s < 25) == ("end", True)


def test_a_signal_to_the_whole_group_ends_program_and_children(tmp_path, wait_until):
    """As a scheduler sends it: nobody is left, and the ledger is ended."""
    command = [*MOE, "run", "--out", "r", "--", "sh", "-c", "sleep 60 & echo $!; wait"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, **streams) as process:
        child = int(process.stdout.readline())
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    wait_until(lambda: not is_alive(child))
    assert fold_ledgers([tmp_path / "r" / "ledger.jsonl"]).segments[0].ended == "end"


def test_a_run_metered_from_outside_counts_once(node, gpu, tmp_path):
    """Inside `moe energy run` a meter keeps its own ledger; the total of both is the outer one's to the millijoule."""
    code = f"""
import time
from moe.energy import EnergyMeter
with EnergyMeter("inner/ledger.jsonl", devices=[{gpu.uuid!r}], interval_s=0.2) as meter:
    meter.phase("forward_backward")
    time.sleep(1)
    meter.progress(1, 64)
"""
    command = [*MOE, "run", "--out", "outer", "--", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=tmp_path, env=node.env, capture_output=True).returncode == 0
    outer, inner = (fold_ledgers([tmp_path / name / "ledger.jsonl"]).total for name in ("outer", "inner"))
    assert 0 < inner.energy_mj <= outer.energy_mj
    command = [*MOE, "total", ".", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=node.env, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert said["measured"]["energy_j"] == outer.energy_j
    assert said["measured"]["device_hours"] == pytest.approx(outer.device_hours)
    shares = {share["name"]: share["measured"]["energy_j"] for share in said["runs"]}
    assert shares == {"inner": inner.energy_j, "outer": pytest.approx(outer.energy_j - inner.energy_j)}
    assert said["measured"]["purposes"]["training"]["energy_j"] > 400
