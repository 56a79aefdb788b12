"""Sensors and what stands in for them. `select_sources` is the one place that decides which of them a meter reads."""

from collections.abc import Sequence
from pathlib import Path

from moe.energy.sources.amd import AmdSource
from moe.energy.sources.base import Conditioned, Device, Source, is_measured
from moe.energy.sources.estimate import EstimateSource
from moe.energy.sources.grace import GraceSource
from moe.energy.sources.nvml import NvmlSource
from moe.energy.sources.pm_counters import PmCounters
from moe.energy.sources.rapl import RaplSource
from moe.energy.sources.visible import VisibleGpu, uuid_of, visible_gpus
from moe.errors import SensorError

__all__ = [
    "SYS",
    "AmdSource",
    "Conditioned",
    "Device",
    "EstimateSource",
    "GraceSource",
    "NvmlSource",
    "PmCounters",
    "RaplSource",
    "Source",
    "VisibleGpu",
    "gpu_sources",
    "host_source",
    "is_measured",
    "node_counter",
    "select_sources",
    "uuid_of",
    "visible_gpus",
]

SYS = Path("/sys")  # a container may have the host's elsewhere


def select_sources(
    devices: Sequence[str] | None = None,
    declared_power_w: float | None = None,
    sys_root: Path = SYS,
) -> list[Source]:
    """The sources for these GPUs (UUIDs or MIG ids), or for this host's processors when none is given.

    A declared power (watts per device) replaces every sensor. GPUs are read through NVML or amdsmi, and it is a
    SensorError when they cannot be. A host is read through the first sensor there is; else it is estimated, the
    device's note saying why. A host is never added to its GPUs: their sum would be of no scope.
    """
    if declared_power_w is not None:
        return [EstimateSource(declared_power_w, list(devices or ()))]
    if devices:
        return gpu_sources([_named_gpu(name) for name in devices])
    return [host_source(sys_root)]


def gpu_sources(gpus: Sequence[VisibleGpu]) -> list[Source]:
    """Sources for GPUs. One that tells neither energy nor power is estimated, and its note says so."""
    sources: list[Source] = []
    amd = [gpu.uuid for gpu in gpus if gpu.uuid.startswith("AMD-")]
    unique = {gpu.uuid: gpu for gpu in gpus if gpu.uuid not in amd}
    blind: list[str] = []
    if amd:
        source = AmdSource(list(dict.fromkeys(amd)))
        blind += source.blind
        sources.append(source)
    if unique:
        nvidia = NvmlSource(list(unique), shared=[gpu.uuid for gpu in gpus if gpu.shared])
        blind += nvidia.blind
        sources.append(nvidia)
    if blind:
        sources.append(EstimateSource(gpu_uuids=blind, note="no sensor: the driver tells neither energy nor power"))
    return [source for source in sources if source.devices]


def host_source(sys_root: Path = SYS) -> Source:
    """The host's widest sensor: the node's own counter, Grace's power meters, RAPL; an estimate where there is none."""
    try:
        return PmCounters(sys_root / "cray/pm_counters")
    except SensorError:
        pass
    try:
        return GraceSource(sys_root / "class/hwmon")
    except SensorError:
        pass
    try:
        return RaplSource(sys_root / "class/powercap")
    except SensorError as error:
        return EstimateSource(note=f"no sensor: {error}")


def node_counter(sys_root: Path = SYS) -> Source | None:
    """The counter of the whole node that can be read beside its devices; None where there is none."""
    try:
        return PmCounters(sys_root / "cray/pm_counters")
    except SensorError:
        return None


def _named_gpu(name: str) -> VisibleGpu:
    if not name.startswith("MIG-"):
        return VisibleGpu(name)
    found = visible_gpus(selection=name)
    if not found:
        raise SensorError(f"MIG slice {name} is not on this machine: name one that `nvidia-smi -L` lists")
    return found[0]
