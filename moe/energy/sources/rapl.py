"""Processor and memory energy from Linux powercap (Intel and AMD RAPL), summed into one device for the host.

Layout under the root: `intel-rapl:N/{name,energy_uj,max_energy_range_uj}` with children `intel-rapl:N:M`. Counted are
the package domains (`package-N`, `package-N-die-D`) and their `dram` child where there is one. Not counted, because
they are already inside or are the same domain twice: `core` and `uncore`, `psys`, the `intel-rapl-mmio` copy of a
package, and a die that mirrors another die's counter, as some processors do.

A domain's counter wraps at its range (an AMD package after some 200 s at 300 W): one wrap an interval is undone, and an
interval so long that there may have been two is a failed read. The sum starts from 0 in each process. Since Linux 5.10
only root may read the counters (CVE-2020-8694).
"""

import re
from pathlib import Path

from moe.energy.clock import boottime_ns
from moe.energy.sources.base import Device
from moe.energy.sources.estimate import host_uuid
from moe.energy.sources.standstill import Standstill
from moe.energy.sources.sysfs import matches
from moe.errors import SensorError

__all__ = ["POWERCAP_ROOT", "RaplSource"]

POWERCAP_ROOT = Path("/sys/class/powercap")
RAPL_BAND = 0.05
RAPL_TICK_S = 0.001
MAX_DOMAIN_W = 1000.0  # no package draws more: how fast a counter can wrap
MIRROR_UJ = 2_000_000  # two dies of one package whose counters are this close count the same thing


class _Domain:
    """One wrapping microjoule counter, unwrapped by differences."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.counter = folder / "energy_uj"
        self._last_ns = boottime_ns()
        try:
            self.last_uj = int(self.counter.read_text())
        except PermissionError:
            raise SensorError(
                f"{self.counter} may only be read by root (CVE-2020-8694): run as root, or `chmod a+r` it, or declare "
                "the power"
            ) from None
        except (OSError, ValueError) as error:
            raise SensorError(f"{self.counter} cannot be read ({error}): declare the power instead") from None
        try:
            self._range_uj: int | None = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            self._range_uj = None
        self.energy_uj = 0

    def update(self) -> None:
        """Add what was used since the last call. Raises OSError or ValueError where that cannot be known."""
        now_uj, now_ns = int(self.counter.read_text()), boottime_ns()
        delta_uj, elapsed_s = now_uj - self.last_uj, (now_ns - self._last_ns) / 1e9
        self.last_uj, self._last_ns = now_uj, now_ns  # also after a failure: the next interval is good again
        if self._range_uj is not None and elapsed_s * MAX_DOMAIN_W * 1e6 > self._range_uj:
            raise ValueError(f"{self.counter} was not read for {elapsed_s:.0f} s and may have wrapped more than once")
        if delta_uj < 0:
            if self._range_uj is None:
                raise ValueError(f"{self.counter} wrapped and its max_energy_range_uj cannot be read")
            delta_uj += self._range_uj
        self.energy_uj += delta_uj


class RaplSource:
    """The host's packages and memory as one device. Raises SensorError, with the reason, where they cannot be read."""

    def __init__(self, root: Path = POWERCAP_ROOT) -> None:
        self._domains = _find_domains(root)
        if not self._domains:
            raise SensorError(f"{root} has no RAPL package domain: declare the power instead")
        self._standstill = Standstill()
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
        """Millijoules of all domains since construction; None when one cannot be read, or all stand still."""
        uuid = self.devices[0].uuid
        failure = None
        for domain in self._domains:
            try:
                domain.update()
            except (OSError, ValueError) as error:
                failure = f"{domain.name}: {error}"
        if failure is None:
            try:
                return {uuid: self._standstill.check(sum(domain.energy_uj for domain in self._domains)) // 1000}
            except ValueError as error:
                failure = str(error)
        self.failures[uuid] = failure
        return {uuid: None}

    def close(self) -> None:
        """Nothing is held open."""


def _find_domains(root: Path) -> list[_Domain]:
    domains: dict[str, _Domain] = {}
    for interface in ("intel-rapl", "intel-rapl-mmio"):
        for folder in matches(root, f"{interface}:*"):
            package = _name(folder)
            if not re.fullmatch(rf"{interface}:\d+", folder.name) or not package.startswith("package-"):
                continue
            if package in domains:
                continue
            domain = _Domain(folder, package)
            if any(_mirrors(domain, other) for other in domains.values()):
                continue
            domains[package] = domain
            # sysfs lists children beside their parents and inside them; a copied tree may have only one of the two
            children = {child.name: child for place in (root, folder) for child in matches(place, f"{folder.name}:*")}
            for _, child in sorted(children.items()):
                if _name(child) == "dram":
                    domains[f"{package}/dram"] = _Domain(child, f"{package}/dram")
    return list(domains.values())


def _mirrors(domain: _Domain, other: _Domain) -> bool:
    """Whether two dies of one package show one counter: read a moment apart, they all but agree."""
    package, _, die = domain.name.partition("-die-")
    other_package, _, other_die = other.name.partition("-die-")
    if not die or not other_die or package != other_package or "/" in other.name:
        return False
    return abs(domain.last_uj - other.last_uj) < MIRROR_UJ


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""
