"""Machines to meter: a node of fake NVIDIA GPUs, one of fake AMD GPUs, a small disk."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .fake_node import FakeGpu, FakeNode, compile_library

FAKE_AMDSMI = '''
"""Two GPUs at 300 W; AMDSMI_STUCK freezes counters, AMDSMI_GUEST takes them away, AMDSMI_OLD names them as before."""
import os, time
class AmdSmiException(Exception): ...
class AmdSmiLibraryException(AmdSmiException): ...
def amdsmi_init(): ...
def amdsmi_shut_down(): ...
def amdsmi_get_processor_handles():
    if "AMDSMI_UNLISTED" in os.environ:
        raise AmdSmiLibraryException("AMDSMI_STATUS_DRM_ERROR")
    return [0, 1]
def amdsmi_get_gpu_device_uuid(handle):
    if os.environ.get("AMDSMI_NO_UUID") == str(handle):
        raise AmdSmiLibraryException("AMDSMI_STATUS_FILE_ERROR")
    return f"{handle}aff74a1-0000-1000-80e8-000000000000"
def amdsmi_get_gpu_asic_info(handle):
    if "AMDSMI_NAMELESS" in os.environ:
        raise AmdSmiLibraryException("AMDSMI_STATUS_NOT_SUPPORTED")
    return {"market_name": "AMD Instinct MI300X"}
def amdsmi_get_energy_count(handle):
    if "AMDSMI_GUEST" in os.environ:
        raise AmdSmiLibraryException("AMDSMI_STATUS_NOT_SUPPORTED")
    seconds = 10 if "AMDSMI_STUCK" in os.environ else time.monotonic()
    name = "power" if "AMDSMI_OLD" in os.environ else "energy_accumulator"
    return {name: int(seconds * 300e6 / 15.3), "counter_resolution": 15.3, "timestamp": time.time_ns()}
def amdsmi_get_power_cap_info(handle):
    if "AMDSMI_GUEST" in os.environ:
        raise AmdSmiLibraryException("AMDSMI_STATUS_NOT_SUPPORTED")
    return {"power_cap": 700_000_000, "max_power_cap": 750_000_000}
def amdsmi_get_power_info(handle):
    told = "N/A" if os.environ.get("AMDSMI_BLIND") else 300
    return {"current_socket_power": told, "average_socket_power": "N/A"}
'''


def wait_until(holds: Callable[[], bool], patience_s: float = 30.0) -> None:
    """Wait for what a busy machine may take its time to do."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., None]:
    return wait_until


@pytest.fixture(autouse=True)
def own_device_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device locks are per machine: tests of several people on one machine must not see each other's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled fake library."""
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a library from a driver that knows neither the energy counter nor fields."""
    return compile_library(tmp_path_factory.mktemp("old_nvml"), "-DOLD_DRIVER")


@pytest.fixture
def node(nvml_library: Path, tmp_path: Path) -> FakeNode:
    """A machine without GPUs; `node.set(gpu)` puts one in."""
    folder = tmp_path / "node"
    folder.mkdir()
    return FakeNode(nvml_library, folder)


@pytest.fixture
def gpu(node: FakeNode) -> FakeGpu:
    """One steady 500 W GPU in the node, its counter moving every 100 ms."""
    return node.set(FakeGpu())


@pytest.fixture
def amd(node: FakeNode, tmp_path: Path) -> FakeNode:
    """The node without NVIDIA's library and with AMD's."""
    (tmp_path / "amdsmi.py").write_text(FAKE_AMDSMI)
    node.env["LD_LIBRARY_PATH"] = "/nonexistent"
    node.env["PYTHONPATH"] += f":{tmp_path}"
    return node


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB that a test can really fill."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("runs on a machine where root may mount a tmpfs, such as a privileged container")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
