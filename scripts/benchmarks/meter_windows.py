"""One tool measures the windows of a plan, in a process that sees the fake library.

meter_windows.py TOOL RESULTS < PLAN writes one JSON object a window and device: {"span", "uuid", "start_ns", "end_ns",
"energy_j", "band_j"}. Each tool is used as its own documentation shows; the moments are the tool's own where it tells
them, else the middle of its call.

    ours        EnergyMeter.window
    zeus        ZeusMonitor.begin_window, end_window: nothing else, since there is no device to synchronise with
    codecarbon  OfflineEmissionsTracker.start_task, stop_task: a tracker a GPU, since it tells the sum of its GPUs
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

JOULES_PER_KWH = 3.6e6


class Told(NamedTuple):
    """What a tool says of one window of one device."""

    uuid: str
    start_ns: int
    end_ns: int
    energy_j: float
    band_j: float | None = None


class Ours:
    """The meter of this repository: one for all devices, windows may overlap."""

    def __init__(self, uuids: list[str]) -> None:
        from moe.energy import EnergyMeter

        self.meter = EnergyMeter(devices=uuids).start()
        self.windows: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        self.windows[name] = self.meter.window(name).__enter__()

    def end(self, name: str) -> None:
        self.windows[name].__exit__(None, None, None)

    def results(self, name: str) -> Iterator[Told]:
        window = self.windows[name]
        by_device = window.by_device
        for device in window.devices:
            energy_j, band_j = by_device[device.uuid]
            yield Told(device.uuid, window.start_ns, window.end_ns, energy_j, band_j)


class Zeus:
    """One monitor for all devices, which it knows by their index."""

    def __init__(self, uuids: list[str]) -> None:
        from zeus.monitor import ZeusMonitor

        self.uuids = uuids
        self.monitor = ZeusMonitor(gpu_indices=list(range(len(uuids))), cpu_indices=[], approx_instant_energy=True)
        self.start_ns: dict[str, int] = {}
        self.told: dict[str, list[Told]] = {}

    def begin(self, name: str) -> None:
        self.start_ns[name], _ = _timed(lambda: self.monitor.begin_window(name, sync_execution=False))

    def end(self, name: str) -> None:
        end_ns, result = _timed(lambda: self.monitor.end_window(name, sync_execution=False))
        joules = result.gpu_energy.items()
        self.told[name] = [Told(self.uuids[i], self.start_ns[name], end_ns, j) for i, j in joules]

    def results(self, name: str) -> Iterator[Told]:
        yield from self.told[name]


class CodeCarbon:
    """One tracker for each device; one task at a time."""

    def __init__(self, uuids: list[str]) -> None:
        from codecarbon import OfflineEmissionsTracker

        self.told: dict[str, list[Told]] = {}
        self.trackers = {
            uuid: OfflineEmissionsTracker(
                country_iso_code="FRA", gpu_ids=[place], allow_multiple_runs=True, save_to_file=False,
                log_level="critical",
            )
            for place, uuid in enumerate(uuids)
        }  # fmt: skip
        for tracker in self.trackers.values():  # what a tracker looks up once, it looks up here
            tracker.start_task("warm up")
            tracker.stop_task("warm up")

    def begin(self, name: str) -> None:
        self.start_ns = {uuid: _timed(lambda t=t: t.start_task(name))[0] for uuid, t in self.trackers.items()}

    def end(self, name: str) -> None:
        self.told[name] = []
        for uuid, tracker in self.trackers.items():
            end_ns, data = _timed(lambda t=tracker: t.stop_task(name))
            energy_j = data.gpu_energy * JOULES_PER_KWH
            self.told[name].append(Told(uuid, self.start_ns[uuid], end_ns, energy_j))

    def results(self, name: str) -> Iterator[Told]:
        yield from self.told[name]


def _timed(call: Callable[[], Any]) -> tuple[int, Any]:
    """(the middle of a call on the boottime clock, what it returned)."""
    before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    result = call()
    return (before_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 2, result


TOOLS: dict[str, type[Ours] | type[Zeus] | type[CodeCarbon]] = {"ours": Ours, "zeus": Zeus, "codecarbon": CodeCarbon}


def main() -> None:
    plan = json.load(sys.stdin)
    tool = TOOLS[sys.argv[1]](plan["uuids"])
    events = [(span["start_s"], tool.begin, span["name"]) for span in plan["spans"]]
    events += [(span["end_s"], tool.end, span["name"]) for span in plan["spans"]]
    for at_s, act, name in sorted(events, key=lambda event: event[0]):
        wait_ns = plan["epoch_ns"] + round(at_s * 1e9) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        time.sleep(max(0, wait_ns) / 1e9)
        act(name)
    time.sleep(0.5)  # our own arithmetic shall not compete with the last burst
    with open(sys.argv[2], "w") as results:  # a tool may print what it likes
        for span in plan["spans"]:
            for told in tool.results(span["name"]):
                results.write(json.dumps({"span": span["name"], **told._asdict()}) + "\n")


if __name__ == "__main__":
    main()
