"""The reader thread: what it may cost, and that nobody who is metered waits for a driver."""

import threading
import time

import pytest

from moe.energy import EnergyMeter
from moe.energy.reader import SHARE, Reader
from moe.energy.sources.base import Device


def reader(interval_s: float, longest_s: float = 4.0) -> Reader:
    return Reader([], interval_s, longest_s, lambda reading, pause_s: None)


def test_dear_rounds_become_rare_until_they_cost_their_share():
    """A round of 1.5 ms each: after ten of them the thread has used its share of the time, and no more."""
    thread, began, spent_s = reader(1.0), 100.0, 0.0
    for _ in range(10):
        spent_s += 0.0015
        began = thread._due_after(began, began + 0.16, spent_s)
    assert spent_s / (began - 100.0) == pytest.approx(SHARE)


def test_cheap_rounds_are_read_every_interval():
    """Half the share leaves the interval as it is."""
    thread = reader(1.0)
    assert thread._due_after(100.0, 100.01, 0.00025) == 101.0


def test_however_dear_it_is_read_now_and_then():
    """A driver that burns a processor is still asked every `longest_s`, so that a kill costs no more than that."""
    thread = reader(1.0)
    assert thread._due_after(100.0, 100.3, 0.3) == 104.0
    assert thread._due_after(104.0, 104.3, 0.6) == 108.0


def test_who_asks_does_not_make_it_dearer():
    """A phase boundary gets its reading where rounds are cheap; where they are dear it waits until the next is due."""
    costs, read = [], []
    thread = Reader([], 1.0, 4.0, lambda reading, pause_s: read.append(pause_s))
    thread.start()
    thread._paid = time.monotonic() + 60
    thread.ask()
    time.sleep(0.3)
    costs.append(len(read))
    thread._paid = 0.0
    thread.ask()
    time.sleep(0.3)
    costs.append(len(read))
    thread.stop()
    assert costs == [1, 2]  # the first is that of the start


def test_a_short_interval_is_kept_whatever_it_costs():
    """Who asks for five readings a second gets them; half an interval of rest is left after a slow one."""
    thread = reader(0.2)
    assert thread._due_after(100.0, 100.05, 0.05) == 100.2
    assert thread._due_after(100.2, 100.4, 0.25) == pytest.approx(100.5)


class GatedSource:
    """A counter whose every read after the first waits until the test lets it go."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self.inside, self.gate = threading.Event(), threading.Event()
        self.readers: list[str] = []
        self.devices = (
            Device(uuid="X", name="slow", kind="gpu", source="counter", scope="gpu", band=0.05, tick_s=0.1),
        )

    def read(self) -> dict[str, int | None]:
        self.readers.append(threading.current_thread().name)
        if len(self.readers) > 1:
            self.inside.set()
            self.gate.wait(60)
        return {"X": time.monotonic_ns()}

    def close(self) -> None: ...


def test_no_call_of_a_running_meter_waits_for_the_driver(tmp_path):
    """While a driver call hangs: phases, progress, totals, a checkpoint's flush, and both ends of a window go on."""
    source, done = GatedSource(), threading.Event()
    meter = EnergyMeter(tmp_path / "ledger.jsonl", sources=[source], interval_s=0.05).start()
    assert source.inside.wait(30)

    def work() -> None:
        for step in range(20):
            for phase in ("data", "forward_backward", "optimizer"):
                meter.phase(phase)
            meter.progress(step, step)
            meter.snapshot()
        time.sleep(0.06)
        meter.phase("checkpoint")  # after a phase long enough for a reading at its boundary
        meter.flush(step=20)
        with meter.window("work"):
            pass
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(30), "a call waited for the driver"
    assert not source.gate.is_set()
    source.gate.set()
    meter.stop()
    assert set(source.readers[1:]) == {"moe-energy-reader"}
