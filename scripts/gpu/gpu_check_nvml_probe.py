"""How far the energy counter can be trusted here: its tick, its agreement with power, what reading it takes.

Order: fields and modes, idle ticks and latency; then, with a load in another process, ticks, agreement over a steady
load and over two bursty ones, latency. Every raw read is kept in nvml_trace.json for replay.
"""

import json
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from gpu_check_nvml import Nvml
from gpu_check_part import ROOT, Part, main
from gpu_check_ticks import compare_with_counter, spread, tick_summary

POWERS = ("power_instant", "power_average", "power_usage")
SAMPLE_PERIOD_S = 0.01  # ten reads a tick of 100 ms; each read still leaves the driver idle most of the time
STARTUP_S = 30.0  # of the load process: CUDA and a warm-up


@dataclass(frozen=True)
class Times:
    """Seconds of each measurement."""

    idle: float = 8.0  # twice: ticks, then agreement with power
    spin: float = 8.0
    settle: float = 2.0  # power and its one-second average reach the load's level
    steady: float = 32.0
    slow: float = 20.0
    fast: float = 15.0
    latency: float = 0.8  # for each call, idle and under load

    def scaled(self, seconds: float) -> "Times":
        """All of them shortened alike to fit into `seconds`."""
        factor = min(1.0, seconds / self.total)
        return Times(**{f.name: getattr(self, f.name) * factor for f in fields(self)})

    @property
    def total(self) -> float:
        return 2 * self.idle + self.spin + 3 * self.settle + self.steady + self.slow + self.fast + 14 * self.latency


DRY = Times(idle=0.8, spin=1.2, settle=0.1, steady=2.0, slow=0.8, fast=0.8, latency=0.05)


class LoadProcess:
    """The other end of gpu_check_load.py."""

    def __init__(self, part: Part) -> None:
        words = ["--device", "cpu", "--side", "256"] if part.dry else []
        self._process = subprocess.Popen(
            [sys.executable, "-B", str(ROOT / "scripts" / "gpu" / "gpu_check_load.py"), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.ready = json.loads(self._line())

    def start(self, command: str) -> None:
        """Begin a load and return when it runs."""
        assert self._process.stdin
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        while not self._line().startswith("started"):
            pass  # the answer of a load whose measurement failed half-way

    def result(self) -> dict[str, Any]:
        """Wait for the load to end."""
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load ended with status {self._process.wait()}; its messages are in the log")
        return line


class Probe:
    """The measurements on one GPU; `trace` holds their raw reads."""

    def __init__(self, part: Part, nvml: Nvml, times: Times) -> None:
        self.part, self.nvml, self.times = part, nvml, times
        self.reads = nvml.reads()
        self.trace: dict[str, Any] = {"clock": "monotonic, ns", "columns": ["time_ns", "counter_mj", *POWERS]}

    def spin(self, name: str, seconds: float) -> dict[str, Any]:
        """Read the counter as fast as it goes; its changes, each with the time of the read that saw it first."""
        read, clock = self.nvml.counter_mj, time.monotonic_ns
        edges, gaps = [], array("q")
        now = start = clock()
        end, last = now + int(seconds * 1e9), read()
        while now < end:
            value, before = read(), now
            now = clock()
            gaps.append(now - before)
            if value != last:
                edges.append((now, value))
                last = value
        self.trace[f"ticks_{name}"] = edges
        # a tick's moment is known to within one read
        read_us = spread([gap / 1000 for gap in gaps])
        return {**tick_summary(edges), "reads": len(gaps), "read_us": read_us, "elapsed_s": (now - start) / 1e9}

    def latency(self) -> dict[str, Any]:
        """Microseconds of each call, back to back."""
        found = {}
        for name, read in self.reads.items():
            found[name] = _timed(read, self.times.latency)
        return found

    def sample(self, name: str, seconds: float) -> dict[str, Any]:
        """Read counter and powers in turn; the counter's energy beside each integrated power."""
        powers = [power for power in POWERS if power in self.reads]
        curves: dict[str, list[tuple[int, float]]] = {power: [] for power in powers}
        counter: list[tuple[int, float]] = []
        end_ns = time.monotonic_ns() + int(seconds * 1e9)
        while time.monotonic_ns() < end_ns:
            counter.append((time.monotonic_ns(), self.nvml.counter_mj()))
            for power in powers:
                value = self.reads[power]()
                if value is not None:
                    curves[power].append((time.monotonic_ns(), value))
            time.sleep(SAMPLE_PERIOD_S)
        self.trace[f"samples_{name}"] = {"counter": counter, **curves}
        found = compare_with_counter(counter, curves)
        for power, curve in curves.items():
            found[f"{power}_w"] = spread([value / 1000 for _, value in curve])
        return found


def run(part: Part) -> None:
    """Everything, section by section."""
    load = LoadProcess(part)
    try:
        uuid = load.ready["torch_uuid"]
        try:
            nvml = Nvml(uuid)
        except RuntimeError as error:
            part.skip(str(error))
        times = DRY if part.dry else Times().scaled(part.seconds_left - 10)
        part.put("seconds_planned", vars(times))
        _measure(part, Probe(part, nvml, times), load)
    finally:
        load.close()


def _measure(part: Part, probe: Probe, load: LoadProcess) -> None:
    nvml, times = probe.nvml, probe.times
    with part.section("facts"):
        uuid, found = load.ready["torch_uuid"], nvml.ask("GetUUID")
        part.put("uuid", {"torch": uuid, "nvml": found, "found_by": nvml.found_by})
        if uuid is not None and nvml.found_by != "uuid":
            part.note(f"the UUID torch tells is not NVML's: {nvml.found_by}")
        part.put("modes", nvml.description())
        part.put("fields", nvml.field_table())
        part.put("reads_that_work", list(probe.reads))
    if "counter" not in probe.reads:
        part.note("this GPU has no readable energy counter: only power could be measured")
        return
    with part.section("idle"):
        part.put("ticks_idle", probe.spin("idle", times.idle))
        part.put("latency_idle_us", probe.latency())
        part.put("idle", probe.sample("idle", times.idle))
    with part.section("ticks under load"):
        load.start(f"steady {times.settle + times.spin}")
        time.sleep(times.settle)
        part.put("ticks_load", probe.spin("load", times.spin))
        part.put("load_of_ticks", load.result())
    loads = {
        "steady": (f"steady {times.settle + times.steady}", times.steady),
        "bursty_slow": (f"bursty {times.settle + times.slow} 300 700", times.slow),
        # the period of the counter itself: the worst case for whatever looks at a part of each period only
        "bursty_fast": (f"bursty {times.settle + times.fast} 50 50", times.fast),
    }
    for name, (command, seconds) in loads.items():
        with part.section(name):
            load.start(command)
            time.sleep(times.settle)
            found = probe.sample(name, seconds)
            probe.trace[f"driver_samples_{name}"] = nvml.power_samples()
            part.put(name, {**found, "load": load.result()})
    with part.section("latency under load"):
        load.start(f"steady {times.latency * (len(probe.reads) + 2)}")
        part.put("latency_load_us", probe.latency())
        part.put("clocks_under_load", {k: v for k, v in nvml.description().items() if "clock" in k or "temp" in k})
        probe.trace["field_stamps"] = nvml.field_stamps()
        load.result()
    with part.section("trace"):
        _write_trace(part, probe.trace)
    _say_headline(part)


def _write_trace(part: Part, trace: dict[str, Any], limit: int = 4_000_000) -> None:
    """Keep the raw reads for replay, in one line of JSON."""
    text = json.dumps(trace, separators=(",", ":"))
    if len(text) > limit:
        part.note(f"the raw trace had {len(text)} bytes and was left out")
        return
    (part.work / "nvml_trace.json").write_text(text + "\n")


def _timed(read: Callable[[], int | None], seconds: float) -> dict[str, float]:
    clock, taken = time.perf_counter_ns, array("q")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = clock()
        read()
        taken.append(clock() - before)
    return {**spread([ns / 1000 for ns in taken]), "mean": statistics.fmean(taken) / 1000}


def _say_headline(part: Part) -> None:
    data = part.data

    def number(*path: str) -> Any:
        value: Any = data
        for word in path:
            value = value.get(word) if isinstance(value, dict) else None
        return "?" if value is None else value

    part.say(f"tick {number('ticks_load', 'interval_ms', 'median')} ms under load")
    part.say(f"{number('ticks_idle', 'interval_ms', 'median')} ms idle")
    part.say(f"idle {number('idle', 'counter_mean_w')} W, steady {number('steady', 'counter_mean_w')} W by counter")
    for power in POWERS[:2]:
        name = power.removeprefix("power_")
        shares = [number(load, power, "percent_over_counter") for load in ("steady", "bursty_slow", "bursty_fast")]
        part.say(f"{name} over counter {'/'.join(map(str, shares))} % (steady/slow/fast)")
    part.say(f"counter read {number('latency_load_us', 'counter', 'median')} us")


if __name__ == "__main__":
    main(run)
