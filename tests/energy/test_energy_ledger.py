"""The ledger file: its chain, its torn end, its lock, and a disk that is really full."""

import errno
import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moe.energy import EnergyMeter, fold_ledgers, read_ledger
from moe.energy.ledger import LedgerWriter
from moe.energy.sources.base import Device
from moe.energy.sources.integral import PowerIntegral
from moe.errors import LedgerError


def write_run(path, **options) -> None:
    with EnergyMeter(path, declared_power_w=100, interval_s=0.1, **options) as meter:
        meter.phase("forward_backward")
        time.sleep(0.25)


def fill(path: Path) -> None:
    """Write to a file until its file system has no room for another page."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, bytes(4096))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(fd)


@pytest.fixture
def read_only(full_disk: Path) -> Path:
    """A folder with a ledger in it, on a file system that can no longer be written."""
    write_run(full_disk / "ledger.jsonl")
    (full_disk / "ledger.jsonl.lock").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    return full_disk


def test_every_line_has_the_contracts_fields_in_time_order(tmp_path):
    """v, kind, segment, seq, utc and boottime_ns on every line; seq counts on; kinds as promised."""
    path = tmp_path / "ledger.jsonl"
    write_run(path)
    write_run(path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["seq"] for record in records] == list(range(len(records)))
    assert {"segment", "reading", "mark", "end"} == {record["kind"] for record in records}
    assert [record["segment"] for record in records if record["kind"] == "segment"] == [0, 1]
    assert all(record["v"] == 1 and record["utc"].endswith("Z") for record in records)
    header = records[0]
    assert {"boot_id", "host", "pid", "devices"} <= header.keys()
    assert {"uuid", "source", "scope", "band"} <= header["devices"][0].keys()
    assert records[-1]["kind"] == "end"


def test_an_altered_line_is_named_by_its_number(tmp_path):
    """One digit of one reading changed: the fold refuses, and says which line."""
    path = tmp_path / "ledger.jsonl"
    write_run(path)
    lines = path.read_text().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines, 1) if n > 3 and '"reading"' in line)
    lines[number - 1] = lines[number - 1].replace('"energy_mj":', '"energy_mj":1')
    path.write_text("".join(lines))
    with pytest.raises(LedgerError, match=rf"altered: line {number} does not match"):
        fold_ledgers([path])
    with pytest.raises(LedgerError, match=rf"line {number} "):
        EnergyMeter(path, declared_power_w=100).start()


def test_a_removed_or_broken_line_is_found(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write_run(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(LedgerError, match="line 3 does not match the hash in line 4"):
        fold_ledgers([path])
    path.write_text("".join(lines[1:]))
    with pytest.raises(LedgerError, match="line 1 is missing"):
        fold_ledgers([path])
    path.write_text("".join([*lines[:2], "nonsense\n", *lines[2:]]))
    with pytest.raises(LedgerError, match="line 3 is not a ledger record"):
        fold_ledgers([path])


def test_a_newer_ledger_is_called_newer_not_damaged(tmp_path):
    """A line of another version may be of a kind, and have fields, that this program does not know."""
    path = tmp_path / "ledger.jsonl"
    newer = {"v": 2, "kind": "carbon", "prev": ""}
    path.write_text(f"{json.dumps(newer)}\n" * 2)
    with pytest.raises(LedgerError, match="line 1 has version 2: this program reads 1"):
        fold_ledgers([path])


def test_a_run_goes_on_without_a_damaged_ledger_and_says_what_is_not_counted(tmp_path):
    """Moved away, as the sentence offers: the new ledger says at which step it begins."""
    path = tmp_path / "ledger.jsonl"
    write_run(path)
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(LedgerError, match=r"restore it from a copy, or move it away: the cost so far is then not"):
        EnergyMeter(path, declared_power_w=100).start()
    path.rename(tmp_path / "damaged.jsonl")
    write_run(path, resumed_step=40)
    assert "the ledger begins at step 40: what the run cost before is not counted" in fold_ledgers([path]).notes
    write_run(path, resumed_step=50)
    assert sum("begins at step" in note for note in fold_ledgers([path]).notes) == 1


@pytest.mark.parametrize("tail", ['{"v":1,"kind":"read', "\0\0\0\0\0\0", "\0\0\0\n"], ids=["cut", "zeros", "zero line"])
def test_a_torn_last_line_is_cut_off_and_reported(tmp_path, capsys, tail):
    """What a power cut leaves does not stop the next segment, and no byte of it stays."""
    path = tmp_path / "ledger.jsonl"
    write_run(path)
    whole = path.read_text()
    path.write_text(whole + tail)
    fold = fold_ledgers([path])
    assert fold.notes[-1] == f"{path}: {len(tail)} bytes of a torn last line were left out"
    write_run(path)
    assert path.read_text().startswith(whole + '{"v":1,"kind":"segment"')
    assert f"torn line of {len(tail)} bytes" in capsys.readouterr().err
    headers = [record for record in read_ledger(path) if record["kind"] == "segment"]
    assert headers[1]["torn_bytes"] == len(tail)


def test_a_power_cut_takes_at_most_one_flush_interval(tmp_path, monkeypatch):
    """fsync comes no later than every flush_s, though readings do not divide it; what it kept is whole lines."""
    path, flush_s = tmp_path / "ledger.jsonl", 1.0
    kept: list[tuple[float, bytes]] = []
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (kept.append((time.monotonic(), path.read_bytes())), fsync(fd)))
    with EnergyMeter(path, declared_power_w=100, interval_s=0.35, flush_s=flush_s):
        time.sleep(3.2)
    times = [at_s for at_s, _ in kept]
    assert len(times) >= 4
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) <= flush_s
    for _, lines in kept:
        path.write_bytes(lines)
        assert list(read_ledger(path, on_torn=pytest.fail))


@pytest.mark.parametrize("kind", ["counter", "integrated"])
def test_a_slow_driver_does_not_make_the_flush_late(tmp_path, monkeypatch, kind):
    """Rounds so dear that readings are as rare as they may be, and nearly an interval long: fsync comes in time."""
    monkeypatch.setattr("moe.energy.reader.PROMPT_S", 0.1)
    monkeypatch.setattr("moe.energy.reader.SHARE", 1e-9)
    times: list[float] = []
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (times.append(time.monotonic()), fsync(fd)))
    source = SlowSource(kind)
    with EnergyMeter(tmp_path / "ledger.jsonl", sources=[source], interval_s=0.3, flush_s=1.5):
        time.sleep(6.0)
    assert source.reads <= 12  # every 0.9 s, and at both ends
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) <= 1.5


def test_power_is_read_before_it_says_nothing_however_long_a_flush_may_wait(tmp_path, monkeypatch):
    """Reads too dear to be made each interval; power may still not be read as rarely as lines are written."""
    monkeypatch.setattr("moe.energy.reader.PROMPT_S", 0.1)
    monkeypatch.setattr("moe.energy.reader.SHARE", 1e-9)
    for file in ("meter", "sources.integral"):
        monkeypatch.setattr(f"moe.energy.{file}.MAX_STEP_S", 1.0)
    source = SteadyPower()
    with EnergyMeter(tmp_path / "ledger.jsonl", sources=[source], interval_s=0.3, flush_s=30):
        time.sleep(3.0)
    assert not source.failures
    assert fold_ledgers([tmp_path / "ledger.jsonl"]).total.energy_j > 280


class SteadyPower:
    """A sensor that tells 100 W."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self.devices = (
            Device(uuid="X", name="steady", kind="gpu", source="integrated", scope="gpu", band=0.05, tick_s=1.0),
        )
        self._integral = PowerIntegral(trailing=True)

    def read(self) -> dict[str, int | None]:
        try:
            return {"X": self._integral.add(100_000.0)}
        except ValueError as error:
            self.failures["X"] = str(error)
            return {"X": None}

    def close(self) -> None: ...


class SlowSource:
    """A sensor whose every read takes 0.2 s."""

    def __init__(self, kind: str) -> None:
        self.failures: dict[str, str] = {}
        self.reads = 0
        self.devices = (Device(uuid="X", name="slow", kind="gpu", source=kind, scope="gpu", band=0.05, tick_s=0.1),)

    def read(self) -> dict[str, int | None]:
        self.reads += 1
        time.sleep(0.2)
        return {"X": time.monotonic_ns()}

    def close(self) -> None: ...


def test_a_flush_waits_for_the_one_under_way(tmp_path, monkeypatch):
    """What a checkpoint names is on the disk although the reader's fsync, which holds it, began before."""
    began, gate = threading.Event(), threading.Event()
    monkeypatch.setattr("os.fsync", lambda fd: (began.set(), gate.wait(30)))
    writer = LedgerWriter(tmp_path / "ledger.jsonl")
    writer.append("gap", device=None, reason="reset", detail="")
    reader, checkpoint = threading.Thread(target=writer.sync), threading.Thread(target=writer.sync)
    reader.start()
    assert began.wait(30)
    checkpoint.start()
    checkpoint.join(0.2)
    assert checkpoint.is_alive()
    gate.set()
    checkpoint.join(30)
    reader.join(30)
    assert not checkpoint.is_alive()


def test_a_stepped_clock_moves_dates_and_nothing_else(tmp_path, monkeypatch):
    """The time of day falls back by an hour within a segment and by a day before the next: durations do not notice."""
    path = tmp_path / "ledger.jsonl"
    today, hours_back = datetime.now(UTC), iter([0, 0, *[1] * 1000])
    for module in ("ledger", "journal"):
        monkeypatch.setattr(
            f"moe.energy.{module}.utc_now",
            lambda: (today - timedelta(hours=next(hours_back))).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        )
    write_run(path)
    hours_back = iter([24] * 1000)
    write_run(path)
    records = list(read_ledger(path))
    assert len({record["utc"] for record in records}) == 3
    fold = fold_ledgers([path])
    read_ns = sum(
        times[-1] - times[0]
        for segment in (0, 1)
        if (times := [r["boottime_ns"] for r in records if r["kind"] == "reading" and r["segment"] == segment])
    )
    assert fold.total.energy_j == pytest.approx(100 * read_ns / 1e9, abs=0.01)
    assert fold.total.coverage > 0.9
    assert fold.devices_at_once == 1
    last = records[-1]["boottime_ns"]
    assert fold.at(1, last) == pytest.approx((fold.total.energy_j, fold.total.device_hours))


def test_one_ledger_has_one_writer(tmp_path):
    """A second meter, in this process or another, is refused in one sentence; the lock dies with its holder."""
    path = tmp_path / "ledger.jsonl"
    code = f"""
        import time
        from moe.energy import EnergyMeter
        EnergyMeter({str(path)!r}, declared_power_w=1).start()
        print("up", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "up\n"
        with pytest.raises(LedgerError, match="is being written by another meter"):
            EnergyMeter(path, declared_power_w=1).start()
        other.kill()
    with EnergyMeter(path, declared_power_w=1) as meter:
        assert meter.segment == 1
        with pytest.raises(LedgerError, match="is being written by another meter"):
            EnergyMeter(path, declared_power_w=1).start()
    with EnergyMeter(path, declared_power_w=1) as meter:
        assert meter.segment == 2


def test_a_full_disk_costs_no_line_once_there_is_room_again(full_disk, capsys, wait_until):
    """The write really fails: the run goes on, says so once, keeps the lines, writes them later, chain whole."""
    path = full_disk / "ledger.jsonl"
    ballast = full_disk / "ballast"
    with EnergyMeter(path, declared_power_w=100, interval_s=0.1, flush_s=0.2) as meter:
        fill(ballast)
        for step in range(40):  # more than the rest of the ledger's last page can take
            meter.flush(step=step, tokens=step)
        refused = capsys.readouterr().err
        assert refused.count("No space left on device") == 1
        size = path.stat().st_size
        wait_until(lambda: meter.snapshot().energy_j > 0)
        assert path.stat().st_size == size
        ballast.unlink()
        wait_until(lambda: "written again" in capsys.readouterr().err)
    steps = [record["step"] for record in read_ledger(path) if record["kind"] == "mark" and record["step"] is not None]
    assert set(steps) == set(range(40))
    assert fold_ledgers([path]).segments[0].ended == "end"


def test_a_disk_that_stays_full_loses_lines_and_says_how_many(full_disk, capsys):
    """What could not be written is counted; what was written still folds."""
    path = full_disk / "ledger.jsonl"
    with EnergyMeter(path, declared_power_w=100, interval_s=0.1, flush_s=0.2) as meter:
        fill(full_disk / "ballast")
        for step in range(40):
            meter.flush(step=step)
    assert "lost its last" in capsys.readouterr().err
    assert fold_ledgers([path]).segments[0].ended == "lost"


def test_an_unwritable_place_is_refused_at_the_start(tmp_path):
    """Before the run, a wrong path is the user's to mend."""
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be made"):
        EnergyMeter(tmp_path / "file" / "ledger.jsonl", declared_power_w=1).start()


def test_a_folder_that_became_read_only_is_refused_by_name_and_still_read(read_only):
    """An older run on a disk that may not be written: no second segment begins, and its cost can be asked for."""
    path = read_only / "ledger.jsonl"
    before = path.read_bytes()
    with pytest.raises(
        LedgerError, match=r"ledger\.jsonl cannot be locked \(Read-only file system\): choose a writable"
    ):
        EnergyMeter(path, declared_power_w=1).start()
    with pytest.raises(LedgerError, match=r"folder of ledger .* cannot be made \(Read-only file system\)"):
        EnergyMeter(read_only / "new" / "ledger.jsonl", declared_power_w=1).start()
    assert path.read_bytes() == before
    assert fold_ledgers([path]).total.energy_j > 0


def test_a_writer_without_a_path_only_counts():
    writer = LedgerWriter(None)
    assert [writer.append("mark"), writer.append("mark")] == [0, 1]
    writer.close()
