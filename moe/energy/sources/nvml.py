"""GPU energy from NVML's integer millijoule counter, through unmodified nvidia-ml-py.

One `nvmlDeviceGetTotalEnergyConsumption` per GPU and read (Volta and newer; no root needed; about every 100 ms the
number moves). Where the driver has no counter (older chips, vGPU) power is read and integrated, and the device says
`integrated`. Nothing else is asked of the driver while a program runs: calls are serialised there, and process lists
in particular take milliseconds.
"""

from collections.abc import Sequence
from typing import Any

from moe.energy.clock import boottime_ns
from moe.energy.sources.base import Device
from moe.errors import SensorError

__all__ = ["NoNvmlError", "NvmlSource", "nvml"]

COUNTER_BAND = 0.05  # proportional gain error seen against external meters is about 5 % (arXiv:2312.02741)
INTEGRATED_BAND = 0.10
COUNTER_TICK_S = 0.1
INTEGRATED_TICK_S = 1.0  # power is a one-second average on current chips
MAX_INTEGRATION_S = 5.0  # two power reads further apart than this say nothing about the time between


class NoNvmlError(SensorError):
    """This machine has no NVIDIA driver (or none is visible from this container)."""


def nvml() -> Any:
    """The initialised `pynvml` module. Raises SensorError where NVML cannot be used, with the driver's reason."""
    try:
        import pynvml
    except ImportError:
        raise SensorError("nvidia-ml-py is not installed: `pip install nvidia-ml-py`, or declare the power") from None
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
        raise NoNvmlError(
            f"NVML cannot be used ({error}): let the container see the driver's utilities, or declare the power"
        ) from None
    except pynvml.NVMLError as error:
        raise SensorError(f"NVML cannot be used ({error}): check the driver, or declare the power") from None
    return pynvml


class _Gpu:
    """One GPU: its handle, and the integral of its power where it has no counter."""

    def __init__(self, handle: Any, device: Device) -> None:
        self.handle = handle
        self.device = device
        self.energy_mj = 0.0
        self.last: tuple[int, int] | None = None  # boottime_ns, power_mw


class NvmlSource:
    """GPUs by UUID. Raises SensorError for a UUID this machine does not have; `shared` ones are noted as whole GPUs."""

    def __init__(self, uuids: Sequence[str], shared: Sequence[str] = ()) -> None:
        self._nvml = nvml()
        self.failures: dict[str, str] = {}
        try:
            self._gpus = [self._open(uuid, uuid in shared) for uuid in uuids]
        except SensorError:
            self.close()
            raise
        self.devices = tuple(gpu.device for gpu in self._gpus)

    def _open(self, uuid: str, shared: bool) -> _Gpu:
        lib = self._nvml
        try:
            handle = lib.nvmlDeviceGetHandleByUUID(uuid)
            name = lib.nvmlDeviceGetName(handle)
        except lib.NVMLError as error:
            raise SensorError(f"GPU {uuid} cannot be opened ({error}): name one that `nvidia-smi -L` lists") from None
        counter = self._has_counter(handle)
        device = Device(
            uuid=uuid,
            name=name,
            kind="gpu",
            source="counter" if counter else "integrated",
            scope="gpu",
            band=COUNTER_BAND if counter else INTEGRATED_BAND,
            tick_s=COUNTER_TICK_S if counter else INTEGRATED_TICK_S,
            p_max_w=self._p_max_w(handle),
            note="whole GPU, shared: no energy is told per MIG slice" if shared else None,
        )
        return _Gpu(handle, device)

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
                if gpu.device.source == "counter":
                    energies[uuid] = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle))
                else:
                    energies[uuid] = self._integrate(gpu)
            except self._nvml.NVMLError as error:
                gpu.last = None
                self.failures[uuid] = str(error)
                energies[uuid] = None
        return energies

    def _integrate(self, gpu: _Gpu) -> int | None:
        """Trapezoid over the last two power reads; None when they are too far apart to say anything."""
        power_mw = int(self._nvml.nvmlDeviceGetPowerUsage(gpu.handle))
        now = boottime_ns()
        last, gpu.last = gpu.last, (now, power_mw)
        if last is not None:
            elapsed_s = (now - last[0]) / 1e9
            if elapsed_s > MAX_INTEGRATION_S:
                self.failures[gpu.device.uuid] = f"no power read for {elapsed_s:.1f} s"
                return None
            gpu.energy_mj += elapsed_s * (power_mw + last[1]) / 2
        return int(gpu.energy_mj)

    def close(self) -> None:
        """Give the library back (it counts its users). A driver that is gone is no error here."""
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return
