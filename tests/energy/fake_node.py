"""A machine whose energy is known: a fake libnvidia-ml.so.1 under the real nvidia-ml-py, and processes that run on it.

A process loads the library once by its soname, so everything that touches NVML runs in a process of its own. What a GPU
of it really used is computed here by the formula of fake_nvml.c, in the same integers.
"""

import os
import shutil
import struct
import subprocess
import sys
import textwrap
import time
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("fake_nvml.c")

Knot = tuple[int, int]  # nanoseconds into the period, milliwatts


@dataclass(frozen=True, kw_only=True)
class PowerScript:
    """Power over time and the sensors that see it; the fields are those of a `script` line of fake_nvml.c.

    knots   power is linear between them, two of one time are a step; the first is at 0, the last ends the period
    """

    knots: tuple[Knot, ...]
    counter_gain: int = 1000
    jitter_ns: int = 0
    power_tick_ns: int = 1
    instant_ns: int = 0

    @cached_property
    def sums_mw_ns(self) -> list[int]:
        """Energy from the start of the period up to each knot."""
        parts = (_ramp_mw_ns(p, q, end - start, end - start) for (start, p), (end, q) in pairwise(self.knots))
        return list(accumulate(parts, initial=0))

    def energy_mw_ns(self, since_ns: int) -> int:
        """Energy of the first nanoseconds, over as many periods as they last."""
        period_ns, _ = self.knots[-1]
        whole, rest = divmod(since_ns, period_ns)
        last = bisect_right(self.knots, rest, key=lambda knot: knot[0]) - 1
        (start, p), (end, q) = self.knots[last : last + 2]
        part = _ramp_mw_ns(p, q, end - start, rest - start)
        return whole * self.sums_mw_ns[-1] + self.sums_mw_ns[last] + part


def _ramp_mw_ns(p: int, q: int, length_ns: int, of_ns: int) -> int:
    """The energy of the first `of_ns` of a stretch in which power goes from p to q: exact, rounded down."""
    return of_ns * (2 * p * length_ns + (q - p) * of_ns) // (2 * length_ns) if length_ns else 0


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
    script: PowerScript | None = None

    @cached_property
    def _power(self) -> PowerScript:
        """The script, or as one what the fields say: the first and the second half of the period."""
        if self.script is not None:
            return self.script
        half, end = self.period_ns // 2, self.period_ns
        knots = ((0, self.power1_mw), (half, self.power1_mw), (half, self.power2_mw), (end, self.power2_mw))
        return PowerScript(knots=knots)

    def energy_mj(self, at_ns: int) -> float:
        """The truth behind the counter: exact energy at a boottime, not held back to the last tick, without gain."""
        return self.base_mj + self._power.energy_mw_ns(at_ns - self.origin_ns) / 1e9

    def counter_mj(self, at_ns: int) -> int:
        """What the counter shows at a boottime, where it ticks without jitter and has gain 1."""
        ticked_ns = (at_ns - self.origin_ns) // self.tick_ns * self.tick_ns
        return self.base_mj + self._power.energy_mw_ns(ticked_ns) // 10**9

    def lines(self) -> list[str]:
        """The GPU in the state file."""
        told = [getattr(self, field.name) for field in fields(self) if field.name != "script"]
        lines = ["gpu " + " ".join(map(str, told)) + "\n"]
        if self.script is not None:
            power = self.script
            words = (power.counter_gain, power.jitter_ns, power.power_tick_ns, power.instant_ns)
            flat = [number for knot in power.knots for number in knot]
            lines.append("script " + " ".join(map(str, (self.uuid, *words, *flat))) + "\n")
        return lines


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

    def fill(self, gpus: Iterable[FakeGpu]) -> None:
        """Put many GPUs in at once."""
        self.gpus.update({gpu.uuid: gpu for gpu in gpus})
        self._write()

    def add_mig(self, uuid: str, parent: str) -> None:
        self.migs[uuid] = parent
        self._write()

    def set_machine(self, init_code: int = 0, persistence: int = 1) -> None:
        """What opening the library returns, and whether the driver stays loaded."""
        self.machine = (init_code, persistence)
        self._write()

    def _write(self) -> None:
        lines = ["machine {} {}\n".format(*self.machine)]
        lines += [line for gpu in self.gpus.values() for line in gpu.lines()]
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


def compile_library(folder: Path, *options: str) -> Path:
    """The library under its soname in this folder, which LD_LIBRARY_PATH may name."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the energy tests compile a small C library: apt-get install gcc"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1", *options]
    subprocess.run([compiler, *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)], check=True)
    return folder
