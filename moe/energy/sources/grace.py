"""Power of NVIDIA Grace processors from Linux's ACPI power meters, integrated: Grace has no RAPL.

Each meter is `class/hwmon/hwmonN/device/{power1_oem_info,power1_average}` (microwatts). Counted is one meter a socket,
`Grace Power Socket N`, which holds the processor and its memory. Not counted: its parts (`CPU Power Socket N`, `SysIO
Power Socket N`), and `Module Power Socket N`, which on a Grace Hopper also holds the GPU.
"""

from pathlib import Path

from moe.energy.sources.base import Device
from moe.energy.sources.estimate import host_uuid
from moe.energy.sources.integral import READ_EVERY_S, PowerIntegral
from moe.energy.sources.sysfs import matches
from moe.errors import SensorError

__all__ = ["HWMON_ROOT", "GraceSource"]

HWMON_ROOT = Path("/sys/class/hwmon")
GRACE_BAND = 0.10
GLIMPSED_BAND = 0.20  # means over less than the time between two reads: some of it is not seen
DEFAULT_INTERVAL_S = 1.0


class GraceSource:
    """The host's Grace sockets as one device. Raises SensorError, with the reason, where there are none to read."""

    def __init__(self, root: Path = HWMON_ROOT) -> None:
        folders = [info.parent for info in matches(root, "hwmon*/device/power1_oem_info") if _is_socket(info)]
        self._meters = [folder / "power1_average" for folder in folders]
        if not self._meters:
            raise SensorError(f"{root} has no power meter of a Grace socket: declare the power instead")
        for meter in self._meters:
            try:
                int(meter.read_text())
            except (OSError, ValueError) as error:
                raise SensorError(f"{meter} cannot be read ({error}): declare the power instead") from None
        intervals_s = [_interval_s(folder) for folder in folders]  # what each meter averages over
        seen = min(1.0, min(intervals_s) / READ_EVERY_S)
        self._integral = PowerIntegral(trailing=seen == 1.0)
        self.failures: dict[str, str] = {}
        self.devices: tuple[Device, ...] = (
            Device(
                uuid=host_uuid(),
                name=f"Grace x {len(self._meters)}",
                kind="cpu",
                source="integrated",
                scope="node",
                band=GRACE_BAND if seen == 1.0 else GLIMPSED_BAND,
                tick_s=max(READ_EVERY_S, *intervals_s),
                seen=seen,
                note="Grace sockets with their memory, average power integrated; not the rest of the node",
            ),
        )

    def read(self) -> dict[str, int | None]:
        """Millijoules of all sockets since the first read; None when any of them cannot be read."""
        uuid = self.devices[0].uuid
        try:
            power_uw = sum(int(meter.read_text()) for meter in self._meters)
        except (OSError, ValueError) as error:
            self._integral.forget()
            self.failures[uuid] = str(error)
            return {uuid: None}
        try:
            return {uuid: self._integral.add(power_uw / 1000)}
        except ValueError as error:
            self.failures[uuid] = str(error)
            return {uuid: None}

    def close(self) -> None:
        """Nothing is held open."""


def _is_socket(info: Path) -> bool:
    try:
        return info.read_text().startswith("Grace Power Socket")
    except OSError:
        return False


def _interval_s(folder: Path) -> float:
    try:
        return int((folder / "power1_average_interval").read_text()) / 1000
    except (OSError, ValueError):
        return DEFAULT_INTERVAL_S
