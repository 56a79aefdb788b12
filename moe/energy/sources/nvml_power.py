"""The best power sensor a GPU has, chosen by architecture, and how much of the time it sees.

    architecture              field          changes every   averages over   at one read a second it sees
    Ampere (not GA100), newer average (185)  100 ms          1 s             all
    GA100, and where unknown  instant (186)  100 ms          25 ms           2.5 %
    Ada, Turing               instant        100 ms          100 ms          10 %
    Volta and older           instant        20 ms           10 ms           1 %

The first row that the driver answers is taken. Update rates and windows as measured in arXiv:2312.02741. A GA100 (A100,
A30) is known by having no average.
"""

from typing import Any

from moe.energy.sources.base import Scope
from moe.energy.sources.integral import READ_EVERY_S

__all__ = ["PowerSensor", "find_power_sensor"]

AVERAGE_WINDOW_S = 1.0


class PowerSensor:
    """One way to ask a GPU for its power; `field` None is the old call. `seen`: share of time its reads cover."""

    def __init__(self, lib: Any, handle: Any, field: tuple[int, int] | None, window_s: float) -> None:
        self.window_s = window_s
        self.seen = min(1.0, window_s / READ_EVERY_S)
        self._lib, self._handle, self._field = lib, handle, field

    @property
    def note(self) -> str:
        """How the number comes about, for the device's note."""
        if self.seen == 1.0:
            return "power averaged over 1 s, integrated: one read a second sees all of the time"
        return f"instantaneous power, integrated: one read a second sees {self.seen:.1%} of the time"

    def read_mw(self) -> int:
        """Milliwatts now. Raises NVMLError: a field can fail while the call that asks for it succeeds."""
        if self._field is None:
            return int(self._lib.nvmlDeviceGetPowerUsage(self._handle))
        (value,) = self._lib.nvmlDeviceGetFieldValues(self._handle, [self._field])
        if value.nvmlReturn != self._lib.NVML_SUCCESS:
            raise self._lib.NVMLError(value.nvmlReturn)
        return int(value.value.uiVal)


def find_power_sensor(lib: Any, handle: Any, scope: Scope) -> PowerSensor | None:
    """The first sensor of the table that answers; None when the GPU tells no power at all."""
    try:
        architecture = int(lib.nvmlDeviceGetArchitecture(handle))
    except lib.NVMLError:
        architecture = 0
    part = lib.NVML_POWER_SCOPE_MODULE if scope == "module" else lib.NVML_POWER_SCOPE_GPU
    instant_s = _instant_window_s(lib, architecture)
    # the old call averages on chips newer than Ampere; on an Ampere it may be a GA100's instant
    usage_s = AVERAGE_WINDOW_S if architecture > lib.NVML_DEVICE_ARCH_AMPERE else instant_s
    candidates = [
        PowerSensor(lib, handle, (lib.NVML_FI_DEV_POWER_INSTANT, part), instant_s),
        PowerSensor(lib, handle, None, usage_s),
    ]
    if architecture >= lib.NVML_DEVICE_ARCH_AMPERE:
        candidates.insert(0, PowerSensor(lib, handle, (lib.NVML_FI_DEV_POWER_AVERAGE, part), AVERAGE_WINDOW_S))
    for sensor in candidates:
        try:
            sensor.read_mw()
        except lib.NVMLError:
            continue
        return sensor
    return None


def _instant_window_s(lib: Any, architecture: int) -> float:
    if architecture <= lib.NVML_DEVICE_ARCH_VOLTA:
        return 0.010
    return 0.100 if architecture in (lib.NVML_DEVICE_ARCH_TURING, lib.NVML_DEVICE_ARCH_ADA) else 0.025
