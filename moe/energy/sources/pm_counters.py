"""Energy of a whole node, accelerators inside, from HPE Cray's `pm_counters`.

`/sys/cray/pm_counters/energy` holds `81147367 J 1700061210920464 us` (older systems: no time), joules since the node
was powered, ten times a second unless `raw_scan_hz` says otherwise.
"""

from pathlib import Path

from moe.energy.sources.base import Device
from moe.energy.sources.estimate import host_uuid
from moe.energy.sources.standstill import Standstill
from moe.errors import SensorError

__all__ = ["PM_COUNTERS_ROOT", "PmCounters"]

PM_COUNTERS_ROOT = Path("/sys/cray/pm_counters")
NODE_BAND = 0.05
DEFAULT_SCAN_HZ = 10


class PmCounters:
    """The node as one device. Raises SensorError where there is no such counter, or it cannot be read."""

    def __init__(self, root: Path = PM_COUNTERS_ROOT) -> None:
        self._energy = root / "energy"
        try:
            _first_number(self._energy)
        except (OSError, ValueError) as error:
            raise SensorError(f"{self._energy} cannot be read ({error}): declare the power instead") from None
        try:
            scan_hz = _first_number(root / "raw_scan_hz")
        except (OSError, ValueError):
            scan_hz = DEFAULT_SCAN_HZ
        self._standstill = Standstill()
        self.failures: dict[str, str] = {}
        self.devices: tuple[Device, ...] = (
            Device(
                uuid=host_uuid(),
                name="node",
                kind="cpu",
                source="node:pm_counters",
                scope="node",
                band=NODE_BAND,
                tick_s=1 / max(scan_hz, 1),
                note="the whole node, its accelerators inside",
            ),
        )

    def read(self) -> dict[str, int | None]:
        """Millijoules since the node was powered; None when the counter cannot be read, or stands still."""
        uuid = self.devices[0].uuid
        try:
            return {uuid: self._standstill.check(_first_number(self._energy)) * 1000}
        except (OSError, ValueError) as error:
            self.failures[uuid] = str(error)
            return {uuid: None}

    def close(self) -> None:
        """Nothing is held open."""


def _first_number(path: Path) -> int:
    words = path.read_text().split()
    if not words:
        raise ValueError(f"{path} is empty")
    return int(words[0])
