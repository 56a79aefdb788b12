"""The meter when its program dies or forks, and when a driver raises or hangs: the ledger stays whole."""

import subprocess
import sys
import time

from moe.energy import EnergyMeter, fold_ledgers, read_ledger
from moe.energy.reader import STOP_WAIT_S
from moe.energy.sources import Device


def test_a_program_that_dies_of_an_exception_ends_at_once_with_a_whole_ledger(tmp_path):
    """The reader keeps nobody alive; a meter nobody stopped still writes its end line."""
    path = tmp_path / "ledger.jsonl"
    code = f"""
import time
from moe.energy import EnergyMeter
EnergyMeter({str(path)!r}, declared_power_w=9, interval_s=3600, flush_s=3600).start()
print(time.monotonic())
1 / 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - float(done.stdout) < STOP_WAIT_S
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert fold_ledgers([path]).segments[0].ended == "end"


def test_a_forked_child_that_stops_its_copy_leaves_the_parents_meter_alone(tmp_path):
    """Data workers are forked: their exit must not end the parent's segment or give back its lock."""
    path = tmp_path / "ledger.jsonl"
    code = f"""
import os
from moe.energy import EnergyMeter
with EnergyMeter({str(path)!r}, declared_power_w=9) as meter:
    child = os.fork()
    if child == 0:
        meter.phase("data"); meter.flush(step=99); meter.stop()
        os._exit(0)
    os.waitpid(child, 0)
    meter.flush(step=1)
    try:
        EnergyMeter({str(path)!r}, declared_power_w=9).start()
    except Exception as error:
        print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "LedgerError\n"
    records = list(read_ledger(path))
    assert [record["kind"] for record in records].count("end") == 1
    assert {record["step"] for record in records if record["kind"] == "mark"} == {None, 1}


class BrokenSource:
    """A sensor whose driver raises, or never answers, after the first read."""

    def __init__(self, hang: bool) -> None:
        self.failures: dict[str, str] = {}
        self.reads = 0
        self._hang = hang
        self.devices = (
            Device(uuid="X", name="broken", kind="gpu", source="counter", scope="gpu", band=0.05, tick_s=0.1),
        )

    def read(self) -> dict[str, int | None]:
        self.reads += 1
        if self.reads > 1:
            if self._hang:
                time.sleep(60)
            raise RuntimeError("driver bug")
        return {"X": 0}

    def close(self) -> None: ...


def test_a_driver_that_raises_is_said_once_and_the_reader_goes_on(tmp_path, capsys, wait_until):
    source = BrokenSource(hang=False)
    with EnergyMeter(tmp_path / "ledger.jsonl", sources=[source], interval_s=0.1) as meter:
        wait_until(lambda: source.reads >= 4)
        assert meter.snapshot().energy_j == 0
    assert capsys.readouterr().err.count("RuntimeError: driver bug") == 1


def test_a_driver_that_hangs_does_not_hang_the_program(tmp_path, monkeypatch):
    """Phases, flush and stop go on; the end line tells that the last read hung."""
    monkeypatch.setattr("moe.energy.reader.STOP_WAIT_S", 0.2)
    path = tmp_path / "ledger.jsonl"
    meter = EnergyMeter(path, sources=[BrokenSource(hang=True)], interval_s=0.1).start()
    time.sleep(0.3)
    start = time.monotonic()
    meter.phase("data")
    meter.flush(step=3)
    meter.stop()
    assert time.monotonic() - start < 15  # the read takes 60
    assert list(read_ledger(path))[-1]["reason"] == "stopped; the last read hung"
