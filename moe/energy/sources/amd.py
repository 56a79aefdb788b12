"""AMD GPUs through `amdsmi`, which comes with ROCm; everything here waits until somebody asks for an AMD GPU.

`amdsmi_get_energy_count` returns a number of steps (`energy_accumulator`; before 6.2.1 `power`) and the microjoules of
a step (`counter_resolution`, about 15.3). The counter was found standing still on some machines until they were booted
again, and guests of a hypervisor have none: a counter that does not move in half a second while the GPU draws power is
not believed, and power is integrated instead.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from moe.energy.sources.base import Device
from moe.energy.sources.integral import READ_EVERY_S, PowerIntegral
from moe.errors import SensorError

__all__ = ["PROBE_S", "AmdSource", "amd_gpu_at", "amdsmi", "visible_amd_gpus"]

PROBE_S = 0.5
COUNTER_BAND = 0.05
GLIMPSED_BAND = 0.20
COUNTER_TICK_S = 0.1
# amdsmi does not say what its power is a mean over: taken for that of a moment, which sees nothing of the time between
SEEN = 0.0
STUCK_NOTE = "the energy counter stands still; power integrated"


def amdsmi() -> Any:
    """The initialised `amdsmi` module. Raises SensorError where there is none, or no driver."""
    try:
        import amdsmi as lib
    except (ImportError, OSError, KeyError):  # its wrapper looks for the library while it is imported
        raise SensorError("amdsmi cannot be imported: install it from /opt/rocm/share/amd_smi") from None
    try:
        lib.amdsmi_init()
    except lib.AmdSmiException as error:
        raise SensorError(f"amdsmi cannot be used ({error}): check the driver, or declare the power") from None
    return lib


def visible_amd_gpus(environ: Mapping[str, str] | None = None, selection: str | None = None) -> list[str]:
    """`AMD-<uuid>` of the GPUs visible under ROCR_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES; [] without amdsmi.

    As in HIP, CUDA_VISIBLE_DEVICES stands in for the second where it is not set. `selection` replaces all: a
    comma-separated list of integers and beginnings of these names. The first entry that names no GPU hides itself and
    all after it.
    """
    environ = os.environ if environ is None else environ
    try:
        lib = amdsmi()
    except SensorError:
        return []
    try:
        uuids = list(_handles(lib))
    finally:
        _shut_down(lib)
    hip = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES")
    lists = [environ.get("ROCR_VISIBLE_DEVICES"), hip] if selection is None else [selection]
    for listed in lists:  # HIP counts among those that ROCR left
        if listed is not None:
            uuids = _chosen(listed, uuids)
    return uuids


def amd_gpu_at(pci: str) -> str:
    """`AMD-<uuid>` of the GPU at a PCI address such as 0000:05:00. Raises SensorError without amdsmi, or such a GPU."""
    lib = amdsmi()
    try:
        for uuid, handle in _handles(lib).items():
            if lib.amdsmi_get_gpu_device_bdf(handle).lower().partition(".")[0] == pci:
                return uuid
    except lib.AmdSmiException as error:
        raise SensorError(f"amdsmi cannot tell its GPUs' PCI addresses ({error}): check the driver") from None
    finally:
        _shut_down(lib)
    raise SensorError(f"amdsmi lists no GPU at {pci}: check that this process may open it")


def _chosen(listed: str, uuids: list[str]) -> list[str]:
    chosen: dict[str, None] = {}
    for entry in (part.strip() for part in listed.split(",")):
        if entry.isdigit():
            matches = uuids[int(entry) : int(entry) + 1]
        else:
            matches = [uuid for uuid in uuids if entry.startswith("AMD-") and uuid.startswith(entry)]
        if len(matches) != 1:
            break
        chosen[matches[0]] = None
    return list(chosen)


class _Gpu:
    """One GPU: its handle, and the integral of its power where its counter is not believed."""

    def __init__(self, handle: Any, device: Device) -> None:
        self.handle = handle
        self.device = device
        self.integral = PowerIntegral()


class AmdSource:
    """GPUs by `AMD-<uuid>`. Raises SensorError for one this machine does not have. Takes half a second to make.

    `blind` lists those that tell neither energy nor power: they are no devices of this source.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._lib = lib = amdsmi()
        self.failures: dict[str, str] = {}
        self.blind: list[str] = []
        self._gpus: list[_Gpu] = []
        try:
            handles = _handles(lib)
            missing = [uuid for uuid in uuids if uuid not in handles]
            if missing:
                raise SensorError(f"GPU {missing[0]} is not on this machine: name one that `amd-smi list` shows")
        except SensorError:
            self.close()
            raise
        before = {uuid: self._energy_mj(handles[uuid]) for uuid in uuids}
        time.sleep(PROBE_S)
        for uuid in uuids:
            self._open(uuid, handles[uuid], before[uuid])
        self.devices = tuple(gpu.device for gpu in self._gpus)

    def _open(self, uuid: str, handle: Any, before_mj: int | None) -> None:
        power_w, after_mj = self._power_w(handle), self._energy_mj(handle)
        stuck = before_mj is not None and after_mj == before_mj and power_w != 0
        counter = before_mj is not None and after_mj is not None and not stuck
        if not counter and power_w is None:
            self.blind.append(uuid)
            return
        device = Device(
            uuid=uuid,
            name=self._name(handle),
            kind="gpu",
            source="counter" if counter else "integrated",
            scope="gpu",
            band=COUNTER_BAND if counter else GLIMPSED_BAND,
            tick_s=COUNTER_TICK_S if counter else READ_EVERY_S,
            seen=1.0 if counter else SEEN,
            p_max_w=self._p_max_w(handle),
            note=None if counter else STUCK_NOTE if stuck else "no energy counter; power integrated",
        )
        self._gpus.append(_Gpu(handle, device))

    def read(self) -> dict[str, int | None]:
        """Millijoules by uuid: since the driver was loaded (counter), or since the first read (integrated)."""
        energies: dict[str, int | None] = {}
        for gpu in self._gpus:
            try:
                if gpu.device.source == "counter":
                    energy_mj = self._energy_mj(gpu.handle)
                else:
                    power_w = self._power_w(gpu.handle)
                    energy_mj = None if power_w is None else gpu.integral.add(power_w * 1000)
                if energy_mj is None:
                    raise ValueError("amdsmi tells no number")
            except ValueError as error:
                gpu.integral.forget()
                self.failures[gpu.device.uuid] = str(error)
                energy_mj = None
            energies[gpu.device.uuid] = energy_mj
        return energies

    def _name(self, handle: Any) -> str:
        try:
            return str(self._lib.amdsmi_get_gpu_asic_info(handle)["market_name"])
        except self._lib.AmdSmiException:
            return "AMD GPU"

    def _energy_mj(self, handle: Any) -> int | None:
        try:
            count = self._lib.amdsmi_get_energy_count(handle)
        except self._lib.AmdSmiException:
            return None
        steps = count["energy_accumulator"] if "energy_accumulator" in count else count["power"]
        return int(steps * count["counter_resolution"] / 1000)

    def _power_w(self, handle: Any) -> float | None:
        try:
            told = self._lib.amdsmi_get_power_info(handle)
        except self._lib.AmdSmiException:
            return None
        for name in ("current_socket_power", "average_socket_power"):
            if isinstance(told.get(name), int | float):  # what a chip does not tell is the text N/A
                return float(told[name])
        return None

    def _p_max_w(self, handle: Any) -> float | None:
        """The highest cap that may be set, told in microwatts; None for what guests are told: 0 or the text N/A."""
        try:
            cap_uw = self._lib.amdsmi_get_power_cap_info(handle).get("max_power_cap")
        except self._lib.AmdSmiException:
            return None
        return cap_uw / 1e6 if isinstance(cap_uw, int | float) and cap_uw > 0 else None

    def close(self) -> None:
        """Give the library back. A driver that is gone is no error here."""
        _shut_down(self._lib)


def _handles(lib: Any) -> dict[str, Any]:
    """The GPUs by `AMD-<uuid>`, those left out that do not tell theirs. Raises SensorError when none can be listed."""
    try:
        listed = lib.amdsmi_get_processor_handles()
    except lib.AmdSmiException as error:
        raise SensorError(f"amdsmi cannot list its GPUs ({error}): check the driver, or declare the power") from None
    handles = {}
    for handle in listed:
        try:
            handles[f"AMD-{lib.amdsmi_get_gpu_device_uuid(handle)}"] = handle
        except lib.AmdSmiException:
            continue
    return handles


def _shut_down(lib: Any) -> None:
    try:
        lib.amdsmi_shut_down()
    except lib.AmdSmiException:
        return
