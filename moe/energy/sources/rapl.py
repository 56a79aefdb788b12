"""Processor and memory energy from Linux powercap (Intel and AMD RAPL), summed into one device for the host.

Layout under the root: `intel-rapl:N/{name,energy_uj,max_energy_range_uj}` with children `intel-rapl:N:M`. Counted are
the package domains and their `dram` child where there is one. Not counted, because they are already inside or are the
same domain twice: `core` and `uncore`, `psys`, and every `intel-rapl-mmio` copy.

A domain's counter wraps at its range (an AMD package after some 200 s at 300 W), so it must be read more often than
that; one wrap an interval is undone, and two cannot be told from none. The sum starts from 0 in each process.
Since Linux 5.10 only root may read the counters (CVE-2020-8694).
"""

import re
from pathlib import Path

from moe.energy.sources.base import Device
from moe.energy.sources.estimate import host_uuid
from moe.errors import SensorError

__all__ = ["POWERCAP_ROOT", "RaplSource"]

POWERCAP_ROOT = Path("/sys/class/powercap")
RAPL_BAND = 0.05
RAPL_TICK_S = 0.001


class _Domain:
    """One wrapping microjoule counter, unwrapped by differences."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._counter = folder / "energy_uj"
        try:
            self._last_uj = int(self._counter.read_text())
        except PermissionError:
            raise SensorError(
                f"{self._counter} may only be read by root: run as root, or `chmod a+r` it, or declare the power"
            ) from None
        except (OSError, ValueError) as error:
            raise SensorError(f"{self._counter} cannot be read ({error}): declare the power instead") from None
        try:
            self._range_uj: int | None = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            self._range_uj = None
        self.energy_uj = 0

    def update(self) -> None:
        """Add what was used since the last call. Raises OSError or ValueError where that cannot be known."""
        now_uj = int(self._counter.read_text())
        delta_uj = now_uj - self._last_uj
        self._last_uj = now_uj  # also after a wrap that cannot be undone: the next interval is good again
        if delta_uj < 0:
            if self._range_uj is None:
                raise ValueError(f"{self._counter} wrapped and its max_energy_range_uj cannot be read")
            delta_uj += self._range_uj
        self.energy_uj += delta_uj


class RaplSource:
    """The host's packages and memory as one device. Raises SensorError, with the reason, where they cannot be read."""

    def __init__(self, root: Path = POWERCAP_ROOT) -> None:
        self._domains = _find_domains(root)
        if not self._domains:
            raise SensorError(f"{root} has no RAPL package domain: declare the power instead")
        self.failures: dict[str, str] = {}
        self.devices: tuple[Device, ...] = (
            Device(
                uuid=host_uuid(),
                name=" + ".join(domain.name for domain in self._domains),
                kind="cpu",
                source="rapl",
                scope="node",
                band=RAPL_BAND,
                tick_s=RAPL_TICK_S,
                note="processor packages and, where counted, memory; not the rest of the node",
            ),
        )

    def read(self) -> dict[str, int | None]:
        """Millijoules of all domains since construction; None when any of them cannot be read."""
        uuid = self.devices[0].uuid
        failure = None
        for domain in self._domains:
            try:
                domain.update()
            except (OSError, ValueError) as error:
                failure = f"{domain.name}: {error}"
        if failure is not None:
            self.failures[uuid] = failure
            return {uuid: None}
        return {uuid: sum(domain.energy_uj for domain in self._domains) // 1000}

    def close(self) -> None:
        """Nothing is held open."""


def _find_domains(root: Path) -> list[_Domain]:
    domains: dict[str, _Domain] = {}
    for folder in sorted(root.glob("intel-rapl:*")):
        if not re.fullmatch(r"intel-rapl:\d+", folder.name):
            continue
        package = _name(folder)
        if not package.startswith("package-") or package in domains:
            continue
        domains[package] = _Domain(folder, package)
        # sysfs lists children beside their parents and inside them; a copied tree may have only one of the two
        children = {child.name: child for place in (root, folder) for child in place.glob(f"{folder.name}:*")}
        for _, child in sorted(children.items()):
            if _name(child) == "dram":
                domains[f"{package}/dram"] = _Domain(child, f"{package}/dram")
    return list(domains.values())


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""
