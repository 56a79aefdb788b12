"""A machine whose energy is known: a fake libnvidia-ml.so.1 under the real nvidia-ml-py, and processes that run on it.

A process loads the library once by its soname, so everything that touches NVML runs in a process of its own.
"""

import os
import shutil
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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
def amdsmi_get_power_info(handle):
    told = "N/A" if os.environ.get("AMDSMI_BLIND") else 300
    return {"current_socket_power": told, "average_socket_power": "N/A"}
'''


@dataclass(frozen=True, kw_only=True)
class FakeGpu:
    """One GPU of the fake node; the fields are those of fake_nvml.c."""

    uuid: str = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
    name: str = "FakeH200"
    bus: int = 1
    mode: str = "ok"
    origin_ns: int = 0
    base_mj: int = 5_000_000
    tick_ns: int = 100_000_000
    sleep_us: int = 0
    power1_mw: int = 500_000
    power2_mw: int = 500_000
    period_ns: int = 10**9
    arch: int = 9
    average: int = 1
    gain: int = 1000
    sliced: int = 0

    def energy_mj(self, at_ns: int) -> float:
        """The truth behind the counter: exact energy at a boottime, not held back to the last tick."""
        whole, rest = divmod(at_ns - self.origin_ns, self.period_ns)
        half = self.period_ns // 2
        first, second = min(rest, half), max(0, rest - half)
        mw_ns = whole * half * (self.power1_mw + self.power2_mw) + first * self.power1_mw + second * self.power2_mw
        return self.base_mj + mw_ns / 1e9


class FakeNode:
    """The GPUs of a machine, and a way to run Python on it."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = library
        self._state = folder / "nvml_state"
        self._calls = folder / "nvml_calls"
        self._calls.write_bytes(bytes(4096))
        self.gpus: dict[str, FakeGpu] = {}
        self.migs: dict[str, str] = {}
        self.machine = (0, 1)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "MOE_", "SLURM_"))},
            "LD_LIBRARY_PATH": str(library),
            "FAKE_NVML_STATE": str(self._state),
            "FAKE_NVML_CALLS": str(self._calls),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(folder),
        }
        self._write()

    def set(self, gpu: FakeGpu, **changes: object) -> FakeGpu:
        """Put a GPU in, or change one while programs run."""
        gpu = replace(gpu, **changes)  # type: ignore[arg-type]
        if not gpu.origin_ns:
            gpu = replace(gpu, origin_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        self.gpus[gpu.uuid] = gpu
        self._write()
        return gpu

    def add_mig(self, uuid: str, parent: str) -> None:
        self.migs[uuid] = parent
        self._write()

    def set_machine(self, init_code: int = 0, persistence: int = 1) -> None:
        """What opening the library returns, and whether the driver stays loaded."""
        self.machine = (init_code, persistence)
        self._write()

    def _write(self) -> None:
        lines = ["machine {} {}\n".format(*self.machine)]
        lines += ["gpu " + " ".join(map(str, vars(gpu).values())) + "\n" for gpu in self.gpus.values()]
        lines += [f"mig {uuid} {parent}\n" for uuid, parent in self.migs.items()]
        aside = self._state.with_suffix(".new")
        aside.write_text("".join(lines))
        aside.replace(self._state)

    def calls(self) -> dict[str, int]:
        """How often the library was asked for what, since the node was made."""
        counts = struct.unpack("4Q", self._calls.read_bytes()[:32])
        return dict(zip(("energy", "power", "processes", "init"), counts, strict=True))

    def start(self, code: str, stdin: int = subprocess.DEVNULL, **env: str) -> subprocess.Popen[str]:
        """Run Python code on the node."""
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**self.env, **env},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, *, patience_s: float = 60, **env: str) -> str:
        """Run Python code on the node to its end; returns what it printed."""
        process = self.start(code, **env)
        out, err = process.communicate(timeout=patience_s)
        assert process.returncode == 0, err
        return out


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


def _compile(folder: Path, *options: str) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the energy tests compile a small C library: apt-get install gcc"
    source = Path(__file__).with_name("fake_nvml.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1", *options]
    subprocess.run([compiler, *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folder


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled fake library."""
    return _compile(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a library from a driver that knows neither the energy counter nor fields."""
    return _compile(tmp_path_factory.mktemp("old_nvml"), "-DOLD_DRIVER")


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
        pytest.skip(f"needs a machine where root may mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
