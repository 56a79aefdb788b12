"""Sensors and what stands in for them. `select_sources` is the one place that decides which of them a meter reads."""

from collections.abc import Sequence
from pathlib import Path

from moe.energy.sources.base import Device, Source, is_measured
from moe.energy.sources.estimate import EstimateSource
from moe.energy.sources.nvml import NvmlSource
from moe.energy.sources.rapl import POWERCAP_ROOT, RaplSource
from moe.energy.sources.visible import VisibleGpu, visible_gpus
from moe.errors import SensorError

__all__ = [
    "Device",
    "EstimateSource",
    "NvmlSource",
    "RaplSource",
    "Source",
    "VisibleGpu",
    "is_measured",
    "select_sources",
    "visible_gpus",
]


def select_sources(
    devices: Sequence[str] | None = None,
    declared_power_w: float | None = None,
    powercap_root: Path = POWERCAP_ROOT,
) -> list[Source]:
    """The sources for these GPUs (UUIDs or MIG ids), or for this host's processors when none is given.

    A declared power (watts per device) replaces every sensor. GPUs are read through NVML, and it is a SensorError when
    they cannot be. A host is read through RAPL where readable; else it is estimated, the device's note saying why.
    """
    if declared_power_w is not None:
        return [EstimateSource(declared_power_w, list(devices or ()))]
    if devices:
        gpus = [_named_gpu(name) for name in devices]
        unique = {gpu.uuid: gpu for gpu in gpus}
        return [NvmlSource(list(unique), shared=[gpu.uuid for gpu in gpus if gpu.shared])]
    try:
        return [RaplSource(powercap_root)]
    except SensorError as error:
        return [EstimateSource(note=f"no sensor: {error}")]


def _named_gpu(name: str) -> VisibleGpu:
    if not name.startswith("MIG-"):
        return VisibleGpu(name)
    found = visible_gpus(selection=name)
    if not found:
        raise SensorError(f"MIG slice {name} is not on this machine: name one that `nvidia-smi -L` lists")
    return found[0]
