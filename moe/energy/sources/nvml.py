"""GPU energy from NVML's integer millijoule counter.

One `nvmlDeviceGetTotalEnergyConsumption` per GPU and read (Volta and newer; no root needed; about every 100 ms the
number moves). Where the driver has no counter (older chips and drivers, vGPU) power is read and integrated, and the
device says `integrated`. A counter that stands still while the GPU draws power is a failed read, not zero joules.
Once a minute the meter asks for temperature, clock and power beside it. Nothing else is asked of the driver while a
program runs: calls are serialised there, and process lists in particular take milliseconds.
"""

from collections.abc import Sequence
from typing import Any

from moe.energy.sources.base import Device, Scope
from moe.energy.sources.integral import PowerIntegral
from moe.energy.sources.nvml_conditions import gpu_conditions
from moe.energy.sources.nvml_library import mend_of, nvml
from moe.energy.sources.nvml_power import PowerSensor, find_power_sensor
from moe.energy.sources.standstill import STUCK_S, Standstill
from moe.errors import SensorError

__all__ = ["NvmlSource"]

COUNTER_BAND = 0.05  # proportional gain error seen against external meters is about 5 % (arXiv:2312.02741)
INTEGRATED_BAND = 0.10
GLIMPSED_BAND = 0.20  # instantaneous power: most of the time between two reads is not seen
COUNTER_TICK_S = 0.1
INTEGRATED_TICK_S = 1.0  # power is a one-second average on current chips

SHARED_NOTE = "whole GPU, shared: no energy is told per MIG slice"
MODULE_NOTE = "whole Grace Hopper module: processor and memory are inside, nothing is added for the host"


class _Gpu:
    """One GPU: its handle, its power sensor, and how long its counter has stood still."""

    def __init__(self, handle: Any, device: Device, power: PowerSensor | None) -> None:
        self.handle = handle
        self.device = device
        self.power = power
        self.integral = PowerIntegral(trailing=power is not None and power.seen == 1.0)
        self.standstill = Standstill()


class NvmlSource:
    """GPUs by UUID; `shared` ones are noted as whole GPUs. Raises SensorError for one that cannot be opened.

    `blind` lists those that tell neither energy nor power: they are no devices of this source.
    """

    def __init__(self, uuids: Sequence[str], shared: Sequence[str] = ()) -> None:
        self._nvml = nvml()
        self.failures: dict[str, str] = {}
        self.blind: list[str] = []
        self._gpus: list[_Gpu] = []
        try:
            parents = {self._parent_of(uuid): uuid for uuid in uuids}
            for parent, uuid in parents.items():
                self._open(parent, shared=uuid in shared or parent != uuid)
        except SensorError:
            self.close()
            raise
        self.devices = tuple(gpu.device for gpu in self._gpus)

    def _parent_of(self, uuid: str) -> str:
        """The GPU itself; for CUDA's UUID of a MIG slice, which torch writes as `GPU-…` too, the GPU it is cut from."""
        lib = self._nvml
        try:
            lib.nvmlDeviceGetHandleByUUID(uuid)
        except lib.NVMLError:
            try:
                part = lib.nvmlDeviceGetHandleByUUID(f"MIG-{uuid.removeprefix('GPU-')}")
                return str(lib.nvmlDeviceGetUUID(lib.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)))
            except lib.NVMLError:
                return uuid
        return uuid

    def _open(self, uuid: str, shared: bool) -> None:
        lib = self._nvml
        try:
            handle = lib.nvmlDeviceGetHandleByUUID(uuid)
            name = lib.nvmlDeviceGetName(handle)
        except lib.NVMLError as error:
            raise SensorError(f"GPU {uuid} cannot be opened ({error}): {mend_of(lib, error)}") from None
        scope: Scope = "module" if "GH200" in name else "gpu"
        power = find_power_sensor(lib, handle, scope)
        counter = self._has_counter(handle)
        if not counter and power is None:
            self.blind.append(uuid)
            return
        notes = [SHARED_NOTE] if shared or self._is_sliced(handle) else []
        notes += [MODULE_NOTE] if scope == "module" else []
        band = COUNTER_BAND
        if not counter and power is not None:
            band = INTEGRATED_BAND if power.seen == 1.0 else GLIMPSED_BAND
            notes.append(power.note)
        device = Device(
            uuid=uuid,
            name=name,
            kind="gpu",
            source="counter" if counter else "integrated",
            scope=scope,
            band=band,
            tick_s=COUNTER_TICK_S if counter else INTEGRATED_TICK_S,
            seen=1.0 if counter or power is None else power.seen,
            p_max_w=self._p_max_w(handle),
            note="; ".join(notes) or None,
        )
        self._gpus.append(_Gpu(handle, device, power))

    def _has_counter(self, handle: Any) -> bool:
        """False only where the driver says there is none: any other failure may pass, and stays a failed read."""
        lib = self._nvml
        try:
            lib.nvmlDeviceGetTotalEnergyConsumption(handle)
        except (lib.NVMLError_NotSupported, lib.NVMLError_FunctionNotFound):
            return False
        except lib.NVMLError:
            pass
        return True

    def _is_sliced(self, handle: Any) -> bool:
        lib = self._nvml
        try:
            return bool(lib.nvmlDeviceGetMigMode(handle)[0] == lib.NVML_DEVICE_MIG_ENABLE)
        except lib.NVMLError:
            return False

    def _p_max_w(self, handle: Any) -> float | None:
        lib = self._nvml
        try:
            return float(lib.nvmlDeviceGetPowerManagementLimitConstraints(handle)[1]) / 1000
        except lib.NVMLError:
            return None

    def read(self) -> dict[str, int | None]:
        """Millijoules by UUID: since the driver was loaded (counter), or since the first read (integrated)."""
        energies: dict[str, int | None] = {}
        for gpu in self._gpus:
            uuid = gpu.device.uuid
            try:
                energies[uuid] = self._count(gpu) if gpu.device.source == "counter" else self._integrate(gpu)
            except self._nvml.NVMLError as error:
                gpu.integral.forget()
                self.failures[uuid] = str(error)
                energies[uuid] = None
            except ValueError as error:
                self.failures[uuid] = str(error)
                energies[uuid] = None
        return energies

    def _count(self, gpu: _Gpu) -> int:
        energy_mj = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle))
        if gpu.standstill.seconds(energy_mj) > STUCK_S and gpu.power is not None:
            try:
                power_w = gpu.power.read_mw() / 1000
            except self._nvml.NVMLError:
                return energy_mj  # nothing speaks against the counter
            if power_w > 0:
                raise ValueError(f"the energy counter is stuck at {energy_mj} mJ while the GPU draws {power_w:.0f} W")
        return energy_mj

    def _integrate(self, gpu: _Gpu) -> int:
        assert gpu.power is not None  # a GPU without either sensor is blind
        return gpu.integral.add(gpu.power.read_mw())

    def conditions(self) -> dict[str, dict[str, Any]]:
        """Temperature, SM clock, power limit, power and throttle reasons of each GPU, as far as the driver tells."""
        return {gpu.device.uuid: gpu_conditions(self._nvml, gpu.handle, gpu.power) for gpu in self._gpus}

    def close(self) -> None:
        """Give the library back (it counts its users). A driver that is gone is no error here."""
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return
