"""What of this machine can be measured, how well, and what would have to change for the rest.

Every sensor the meter would use is opened and watched for a quarter of a second: a counter that moves shows its tick,
each read how long the driver takes. Nothing is written and no lock is taken.
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from moe.energy.locks import device_reader
from moe.energy.sources import SYS, EstimateSource, RaplSource, gpu_sources, host_source, node_counter, visible_gpus
from moe.energy.sources.base import COUNTERS, Conditioned, Device, Source, is_measured
from moe.energy.sources.nvml_library import nvml
from moe.errors import MoEError, SensorError

__all__ = ["Diagnosis", "Missing", "Sensor", "examine"]

WATCH_S = 0.25
POLL_S = 0.002
HOST_COUNTERS = ("rapl", "node:pm_counters")  # a machine that is on always moves them


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """One device as the meter would read it.

    tick_s       how often the number changes, seen when `tick_seen`, else declared; call_us: one device's read
    failure      why it cannot be trusted now; None when it can
    reader_pid   the meter that already reads it; None when nobody does
    by_default   whether a run that asks for nothing is metered by it
    """

    device: Device
    tick_s: float
    tick_seen: bool
    call_us: float
    failure: str | None
    reader_pid: int | None
    by_default: bool


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Something that is not measured here, why, and what to do about it."""

    what: str
    why: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The machine. `measured`: whether a run that asks for nothing gets its energy from sensors alone."""

    host: str
    measured: bool
    sensors: list[Sensor]
    missing: list[Missing]

    def to_json(self) -> dict[str, Any]:
        """As `moe energy doctor --json` prints it."""
        return asdict(self)


def examine(sys_root: Path = SYS) -> Diagnosis:
    """Look at this machine; takes about half a second. `sys_root` is where its sysfs is mounted."""
    missing: list[Missing] = []
    found = _gpus(missing)
    gpus = found or []
    host = [host_source(sys_root)]
    node = node_counter(sys_root)
    if node is None:
        missing.append(
            Missing(
                what="whole node",
                why="it has no counter that can be read from here",
                mend="`moe energy node RUN FILE` joins readings of a PDU, IPMI, Redfish or SLURM later",
            )
        )
    sensors = _watch(gpus, by_default=True) + _watch(host, by_default=found == [])
    for source in (*gpus, *host, *([node] if node else [])):
        source.close()
    missing += _host_missing(sys_root, sensors)
    used = [sensor for sensor in sensors if sensor.by_default]
    measured = bool(used) and all(is_measured(sensor.device.source) and sensor.failure is None for sensor in used)
    return Diagnosis(host=socket.gethostname(), measured=measured, sensors=sensors, missing=missing)


def _gpus(missing: list[Missing]) -> list[Source] | None:
    """The sources of the visible GPUs; None when there are some and they cannot be read. What hinders is `missing`."""
    try:
        gpus = visible_gpus()
        sources = gpu_sources(gpus)
    except MoEError as error:
        why, _, mend = str(error).rpartition(": ")
        missing.append(Missing(what="GPUs", why=why, mend=mend))
        return None
    if not gpus:
        missing.append(_no_gpu())
    idle = _unloaded_when_idle([gpu.uuid for gpu in gpus if gpu.uuid.startswith("GPU-")])
    if idle:
        missing.append(
            Missing(
                what="energy between two runs",
                why=f"persistence mode is off on {idle} GPUs: counters restart when nobody uses the driver",
                mend="`nvidia-smi -pm 1` as root",
            )
        )
    return sources


def _no_gpu() -> Missing:
    try:
        nvml().nvmlShutdown()
    except SensorError as error:
        why, _, mend = str(error).rpartition(": ")
        return Missing(what="GPUs", why=why, mend=f"where there are some: {mend}")
    why = "CUDA_VISIBLE_DEVICES and cgroups leave none of the GPUs there are"
    return Missing(what="GPUs", why=why, mend="name some, or ask the scheduler for some")


def _unloaded_when_idle(uuids: Sequence[str]) -> int:
    """How many of these GPUs lose their driver, and their counter's value, when the last user closes it."""
    if not uuids:
        return 0
    lib = nvml()
    count = 0
    for uuid in uuids:
        try:
            mode = lib.nvmlDeviceGetPersistenceMode(lib.nvmlDeviceGetHandleByUUID(uuid))
        except lib.NVMLError:
            continue
        count += mode == lib.NVML_FEATURE_DISABLED
    lib.nvmlShutdown()
    return count


def _host_missing(sys_root: Path, sensors: Sequence[Sensor]) -> list[Missing]:
    """What keeps the processors from being measured, where they are not."""
    if any(sensor.device.kind == "cpu" and is_measured(sensor.device.source) for sensor in sensors):
        return []
    powercap = sys_root / "class/powercap"
    try:
        RaplSource(powercap)
    except SensorError as error:
        if "CVE-2020-8694" in str(error):
            return [
                Missing(
                    what="processors",
                    why="RAPL counters may only be read by root since CVE-2020-8694",
                    mend=f"`chmod a+r {powercap}/*/energy_uj` as root, if users here may see each other's power",
                )
            ]
        return [Missing(what="processors", why=str(error).partition(": ")[0], mend="`--power W` declares a power")]
    return []


def _watch(sources: Sequence[Source], by_default: bool) -> list[Sensor]:
    """Read sources for a while, and see when their numbers change and how long a read takes."""
    watched = [source for source in sources if not isinstance(source, EstimateSource)]
    changes: dict[str, list[float]] = {}
    values: dict[str, int | None] = {}
    calls_us: dict[str, list[float]] = {}
    end = time.monotonic() + (WATCH_S if watched else 0.0)
    while time.monotonic() < end:
        for source in watched:
            before = time.monotonic()
            read = source.read()
            after = time.monotonic()
            for uuid, value in read.items():
                calls_us.setdefault(uuid, []).append((after - before) / len(read) * 1e6)
                if values.get(uuid, value) != value:
                    changes.setdefault(uuid, []).append(after)
                values[uuid] = value
        time.sleep(POLL_S)
    sensors = []
    for source in sources:
        powers_w = _powers_w(source)
        for device in source.devices:
            moved = changes.get(device.uuid, [])
            seen = device.source in COUNTERS and len(moved) > 1
            failure = source.failures.get(device.uuid) if values.get(device.uuid, 0) is None else None
            if device.source == "counter" and not moved and failure is None and powers_w.get(device.uuid, 0.0) > 0:
                failure = f"the counter stands still while the GPU draws {powers_w[device.uuid]:.0f} W"
            if device.source in HOST_COUNTERS and not moved and failure is None and device.tick_s < WATCH_S / 2:
                failure = f"the counter stands still: no change in {WATCH_S:g} s"
            sensors.append(
                Sensor(
                    device=device,
                    tick_s=median(b - a for a, b in pairwise(moved)) if seen else device.tick_s,
                    tick_seen=seen,
                    call_us=median(calls_us.get(device.uuid, [0.0])),
                    failure=failure,
                    reader_pid=device_reader(device.uuid),
                    by_default=by_default,
                )
            )
    return sensors


def _powers_w(source: Source) -> dict[str, float]:
    if not isinstance(source, Conditioned):
        return {}
    return {uuid: told.get("power_w", 0.0) for uuid, told in source.conditions().items()}
