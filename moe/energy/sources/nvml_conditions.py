"""What a GPU works under: temperature, SM clock, power and its limit, and what holds the clock down."""

from collections.abc import Callable
from typing import Any

from moe.energy.sources.nvml_power import PowerSensor

__all__ = ["gpu_conditions"]

# bits of nvmlDeviceGetCurrentClocksEventReasons that cost speed; idleness and chosen clocks do not
_REASONS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}


def gpu_conditions(lib: Any, handle: Any, power: PowerSensor | None) -> dict[str, Any]:
    """The fields of a `reading` line that the driver tells; what it does not tell is left out. Five calls."""
    asks: dict[str, Callable[[], Any]] = {
        "temperature_c": lambda: _temperature_c(lib, handle),
        "sm_clock_mhz": lambda: lib.nvmlDeviceGetClockInfo(handle, lib.NVML_CLOCK_SM),
        "power_limit_w": lambda: lib.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "throttle": lambda: _reasons(lib, handle),
    }
    if power is not None:
        asks["power_w"] = lambda: power.read_mw() / 1000
    found = {}
    for name, ask in asks.items():
        try:
            found[name] = ask()
        except lib.NVMLError:
            continue
    return found


def _temperature_c(lib: Any, handle: Any) -> int:
    try:
        return int(lib.nvmlDeviceGetTemperatureV(handle, lib.NVML_TEMPERATURE_GPU))
    except lib.NVMLError_FunctionNotFound:  # older drivers
        return int(lib.nvmlDeviceGetTemperature(handle, lib.NVML_TEMPERATURE_GPU))


def _reasons(lib: Any, handle: Any) -> list[str]:
    try:
        bits = lib.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except lib.NVMLError_FunctionNotFound:  # its older name
        bits = lib.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return [name for bit, name in _REASONS.items() if bits & bit]
