"""Energy as time times a stated power, where no sensor can be read. Never a measurement, and named so everywhere."""

import socket
from collections.abc import Sequence

from moe.energy.clock import boottime_ns
from moe.energy.sources.base import Device
from moe.errors import ConfigError

__all__ = ["ESTIMATE_BAND", "GPU_POWER_W", "HOST_POWER_W", "EstimateSource", "host_uuid"]

# One busy host without accelerators, processor and memory together: a round figure so that a run on such a machine has
# a cost axis at all. It is no measurement; pass the machine's own power to replace it.
HOST_POWER_W = 100.0

# A data-centre GPU whose sensors cannot be read: the rated power of an H100, H800 or H200 SXM (data sheets).
GPU_POWER_W = 700.0

# Training nodes were found to draw up to 37 % less than time times rated power says (arXiv:2506.14551).
ESTIMATE_BAND = 0.37


def host_uuid() -> str:
    """The key of this host's processors, counted as one device."""
    return f"CPU-{socket.gethostname()}"


class EstimateSource:
    """`power_w` for each device from the moment of construction on.

    `power_w=None` takes HOST_POWER_W or GPU_POWER_W under the source `estimate:tdp`; a given power is `declared`.
    Without `gpu_uuids` the one device is this host.
    """

    def __init__(self, power_w: float | None = None, gpu_uuids: Sequence[str] = (), note: str | None = None) -> None:
        if power_w is not None and not 0 < power_w < 1e6:
            raise ConfigError(
                f"declared power {power_w!r} W must be above 0 and below a megawatt: give watts per device"
            )
        default = GPU_POWER_W if gpu_uuids else HOST_POWER_W
        watts = default if power_w is None else power_w
        self._power_mw = round(watts * 1000)
        self._start_ns = boottime_ns()
        self.failures: dict[str, str] = {}
        self.devices = tuple(
            Device(
                uuid=uuid or host_uuid(),
                name=f"GPU at {watts:g} W" if uuid else f"host at {watts:g} W",
                kind="gpu" if uuid else "cpu",
                source="estimate:tdp" if power_w is None else "declared",
                scope="gpu" if uuid else "node",
                band=ESTIMATE_BAND,
                tick_s=0.0,
                p_max_w=watts,
                note=note,
            )
            for uuid in (gpu_uuids or [""])
        )

    def read(self) -> dict[str, int | None]:
        """Millijoules since construction."""
        energy_mj = self._power_mw * (boottime_ns() - self._start_ns) // 10**9
        return {device.uuid: energy_mj for device in self.devices}

    def close(self) -> None:
        """Nothing to release."""
