"""NVML as the probe reads it: one GPU, every call by a name, and no call that changes a setting."""

import time
from collections.abc import Callable
from typing import Any

# field id -> (what it is, member of the value union that nvidia-ml-py is to read)
FIELDS = {
    83: ("total energy", "ullVal"),
    191: ("energy", "ullVal"),
    185: ("power, average of 1 s", "uiVal"),
    186: ("power, instant", "uiVal"),
    187: ("power limit, least", "uiVal"),
    188: ("power limit, largest", "uiVal"),
    189: ("power limit, default", "uiVal"),
    190: ("power limit, enforced", "uiVal"),
    192: ("power limit, requested", "uiVal"),
}
SCOPES = {0: "gpu", 1: "module", 2: "memory", 3: "gpu base"}
TOTAL_POWER_SAMPLES = 0
NVLINKS = 18


class Nvml:
    """The GPU `uuid` (as torch writes it, without "GPU-"), or the first one.

    `found_by` says whether the UUID led to it; where it does not and the machine has one GPU, that one is taken.
    Raises RuntimeError, with the driver's reason, where NVML cannot be used.
    """

    def __init__(self, uuid: str | None = None) -> None:
        try:
            import pynvml
        except ImportError:
            raise RuntimeError("nvidia-ml-py is not installed") from None
        self.lib: Any = pynvml
        self.found_by = "index"
        try:
            pynvml.nvmlInit()
            if uuid is not None:
                try:
                    self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
                    self.found_by = "uuid"
                    return
                except pynvml.NVMLError as error:
                    if pynvml.nvmlDeviceGetCount() != 1:
                        raise
                    self.found_by = f"index, because GPU-{uuid} was not found: {error}"
            self.handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML cannot be used ({error})") from None

    def ask(self, name: str, *arguments: Any) -> Any:
        """`nvmlDevice<name>(handle, …)`, or the driver's error as text: what a machine cannot tell is a finding too."""
        return self._asked(getattr(self.lib, f"nvmlDevice{name}", None), self.handle, *arguments)

    def system(self, name: str, *arguments: Any) -> Any:
        """`nvml<name>(…)`, or the driver's error as text."""
        return self._asked(getattr(self.lib, f"nvml{name}", None), *arguments)

    def _asked(self, call: Callable[..., Any] | None, *arguments: Any) -> Any:
        if call is None:
            return "not in this nvidia-ml-py"
        try:
            value = call(*arguments)
        except Exception as error:  # also a binding of another version, whose arguments differ
            return str(error)
        return value.decode() if isinstance(value, bytes) else value

    def works(self, read: Callable[[], int | None]) -> bool:
        """Whether a read gives a number here."""
        try:
            return read() is not None
        except self.lib.NVMLError:
            return False

    # ---- the reads that are timed and traced; each raises NVMLError or gives None ----

    def counter_mj(self) -> int:
        return int(self.lib.nvmlDeviceGetTotalEnergyConsumption(self.handle))

    def power_usage_mw(self) -> int:
        return int(self.lib.nvmlDeviceGetPowerUsage(self.handle))

    def field(self, field_id: int, scope: int = 0) -> int | None:
        """One field's value; None when the driver refuses this field, which raises nothing."""
        value = self.lib.nvmlDeviceGetFieldValues(self.handle, [(field_id, scope)])[0]
        return None if value.nvmlReturn else int(getattr(value.value, FIELDS[field_id][1]))

    def power_fields(self) -> int | None:
        """The energy counter, average and instant power in one call."""
        values = self.lib.nvmlDeviceGetFieldValues(self.handle, [(83, 0), (185, 0), (186, 0)])
        return None if any(value.nvmlReturn for value in values) else int(values[0].value.ullVal)

    def reads(self) -> dict[str, Callable[[], int | None]]:
        """Every read by its name, those that do not work here left out."""
        reads: dict[str, Callable[[], int | None]] = {
            "counter": self.counter_mj,
            "power_usage": self.power_usage_mw,
            "power_average": lambda: self.field(185),
            "power_instant": lambda: self.field(186),
            "energy_field": lambda: self.field(83),
            "three_fields": self.power_fields,
        }
        return {name: read for name, read in reads.items() if self.works(read)}

    # ---- what is asked once ----

    def field_table(self) -> list[dict[str, Any]]:
        """Every power and energy field at every scope: the driver's verdict, and the value where it has one."""
        rows = []
        for field_id, (name, member) in FIELDS.items():
            for scope, scope_name in SCOPES.items():
                row: dict[str, Any] = {"field": field_id, "name": name, "scope": scope, "scope_name": scope_name}
                try:
                    value = self.lib.nvmlDeviceGetFieldValues(self.handle, [(field_id, scope)])[0]
                except self.lib.NVMLError as error:
                    rows.append({**row, "error": str(error)})
                    continue
                row.update(nvml_return=value.nvmlReturn, value_type=value.valueType, latency_us=value.latencyUsec)
                if not value.nvmlReturn:
                    row.update(value=int(getattr(value.value, member)), timestamp_us=value.timestamp)
                rows.append(row)
        return rows

    def field_stamps(self, reads: int = 60, period_s: float = 0.01) -> list[list[int]]:
        """Whether a field's own time stamp tells when its value was made: [field, read at (ns), stamp (us), value]."""
        rows = []
        for _ in range(reads):
            for value in self.lib.nvmlDeviceGetFieldValues(self.handle, [(83, 0), (186, 0)]):
                if not value.nvmlReturn:
                    number = int(getattr(value.value, FIELDS[value.fieldId][1]))
                    rows.append([int(value.fieldId), time.monotonic_ns(), int(value.timestamp), number])
            time.sleep(period_s)
        return rows

    def power_samples(self) -> list[tuple[int, int]] | str:
        """The driver's own buffer of power samples: (microseconds since 1970, milliwatts)."""
        found = self.ask("GetSamples", TOTAL_POWER_SAMPLES, 0)
        if isinstance(found, str):
            return found
        return [(int(sample.timeStamp), int(sample.sampleValue.uiVal)) for sample in found[1]]

    def description(self) -> dict[str, Any]:
        """Identity, modes, limits and links; settings are read and never changed."""
        asked = {
            "name": "GetName",
            "uuid": "GetUUID",
            "persistence_mode": "GetPersistenceMode",
            "mig_mode_now_and_pending": "GetMigMode",
            "compute_mode": "GetComputeMode",
            "ecc_mode_now_and_pending": "GetEccMode",
            "architecture": "GetArchitecture",
            "power_limit_range_mw": "GetPowerManagementLimitConstraints",
            "power_limit_mw": "GetPowerManagementLimit",
            "power_limit_enforced_mw": "GetEnforcedPowerLimit",
            "pcie_generation": "GetCurrPcieLinkGeneration",
            "pcie_width": "GetCurrPcieLinkWidth",
            "numa_node": "GetNumaNodeId",
        }
        facts: dict[str, Any] = {name: self.ask(call) for name, call in asked.items()}
        pci = self.ask("GetPciInfo")
        facts["pci_bus_id"] = pci if isinstance(pci, str) else str(self._asked(lambda: pci.busId))
        facts["sm_clock_mhz"] = self.ask("GetClockInfo", 1)
        facts["sm_clock_max_mhz"] = self.ask("GetMaxClockInfo", 1)
        facts["memory_clock_mhz"] = self.ask("GetClockInfo", 2)
        facts["temperature_c"] = self.ask("GetTemperature", 0)
        facts["nvlinks_active"] = sum(self.ask("GetNvLinkState", link) == 1 for link in range(NVLINKS))
        facts["driver"] = self.system("SystemGetDriverVersion")
        facts["nvml"] = self.system("SystemGetNVMLVersion")
        facts["cuda_driver"] = self.system("SystemGetCudaDriverVersion_v2")
        return facts

    def topology(self) -> dict[str, Any]:
        """How the GPUs of this machine are connected: NVML's level of the nearest common ancestor for each pair.

        0 same board, 10 one PCIe switch, 20 several, 30 host bridge, 40 NUMA node, 50 across the system.
        """
        count = self.system("DeviceGetCount")
        if isinstance(count, str):
            return {"gpus": count}
        handles = [self.system("DeviceGetHandleByIndex", index) for index in range(count)]
        opened = [(index, handle) for index, handle in enumerate(handles) if not isinstance(handle, str)]
        pairs = {
            f"{i}-{j}": self.system("DeviceGetTopologyCommonAncestor", a, b)
            for i, a in opened
            for j, b in opened
            if i < j
        }
        return {"gpus": count, "may_open": len(opened), "common_ancestor": pairs}
