"""Which GPUs a program uses, by UUID: CUDA_VISIBLE_DEVICES read the way CUDA reads it, or what torch says of a GPU."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe.energy.sources.amd import amd_gpu_at, visible_amd_gpus
from moe.energy.sources.nvml_library import NoNvmlError, nvml
from moe.errors import ConfigError, SensorError

__all__ = ["VisibleGpu", "uuid_of", "visible_gpus"]


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU's UUID, and whether only a MIG slice of it is visible (then its whole energy is what can be told)."""

    uuid: str
    shared: bool = False


def visible_gpus(environ: Mapping[str, str] | None = None, selection: str | None = None) -> list[VisibleGpu]:
    """GPUs visible under `environ` (default: this process's), each once, in CUDA's order; AMD's where there is no NVML.

    `selection` replaces CUDA_VISIBLE_DEVICES: a comma-separated list of integers, UUIDs or unique beginnings of UUIDs,
    and MIG ids. As in CUDA, the first entry that names no GPU hides itself and all after it. Integers count GPUs in
    PCI order when CUDA_DEVICE_ORDER=PCI_BUS_ID, or when all GPUs are of one model (CUDA's own order is then the same);
    otherwise they raise ConfigError, because CUDA would sort by a speed NVML does not know. A driver that is there but
    broken is a SensorError.
    """
    environ = os.environ if environ is None else environ
    try:
        lib = nvml()
    except NoNvmlError:
        return [VisibleGpu(uuid) for uuid in visible_amd_gpus(environ, selection)]
    try:
        gpus = _openable(lib)
        listed = environ.get("CUDA_VISIBLE_DEVICES") if selection is None else selection
        if listed is None:
            return [VisibleGpu(uuid) for uuid, _ in gpus]
        ordered = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({name for _, name in gpus}) < 2
        found: dict[str, VisibleGpu] = {}
        for entry in (part.strip() for part in listed.split(",")):
            if entry.isdigit() and not ordered:
                raise ConfigError(
                    f"CUDA_VISIBLE_DEVICES={listed}: GPUs of several models have no certain order: "
                    "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs"
                )
            gpu = _resolve(lib, entry, [uuid for uuid, _ in gpus])
            if gpu is None:
                break
            found.setdefault(gpu.uuid, gpu)
        return list(found.values())
    finally:
        lib.nvmlShutdown()


def uuid_of(properties: Any, *, hip: bool) -> str:
    """The name a meter knows a GPU by, from what torch.cuda.get_device_properties tells; `hip` is torch built for ROCm.

    amdsmi's UUID of a GPU is another than HIP's: the GPU is found by its PCI address. Where amdsmi cannot tell, HIP's
    stays, which no meter can read, and opening it says why.
    """
    if not hip:
        return f"GPU-{properties.uuid}"
    numbers = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    try:
        return amd_gpu_at("{:04x}:{:02x}:{:02x}".format(*numbers))
    except SensorError:
        return f"AMD-{properties.uuid}"


def _openable(lib: Any) -> list[tuple[str, str]]:
    """(uuid, name) of the GPUs this process may open, in PCI order. The count includes those a cgroup blocks."""
    gpus = []
    for index in range(lib.nvmlDeviceGetCount()):
        try:
            handle = lib.nvmlDeviceGetHandleByIndex(index)
            pci = lib.nvmlDeviceGetPciInfo(handle)
            place = (pci.domain, pci.bus, pci.device)
            gpus.append((place, lib.nvmlDeviceGetUUID(handle), lib.nvmlDeviceGetName(handle)))
        except lib.NVMLError:
            continue
    return [(uuid, name) for _, uuid, name in sorted(gpus)]


def _resolve(lib: Any, entry: str, uuids: list[str]) -> VisibleGpu | None:
    if entry.isdigit():
        return VisibleGpu(uuids[int(entry)]) if int(entry) < len(uuids) else None
    if entry.startswith("MIG-GPU-"):  # the older form, MIG-GPU-<uuid>/<instance>/<compute instance>
        parent = entry.removeprefix("MIG-").partition("/")[0]
        return VisibleGpu(parent, shared=True) if parent in uuids else None
    if entry.startswith("MIG-"):
        try:
            slice_handle = lib.nvmlDeviceGetHandleByUUID(entry)
            parent = lib.nvmlDeviceGetUUID(lib.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_handle))
        except lib.NVMLError:
            return None
        return VisibleGpu(parent, shared=True)
    matches = [uuid for uuid in uuids if entry.startswith("GPU-") and uuid.startswith(entry)]
    return VisibleGpu(matches[0]) if len(matches) == 1 else None
