"""Processor energy from a powercap tree: which domains count, wraps, and what may not be read."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe.energy import select_sources
from moe.energy.sources.rapl import RaplSource
from moe.errors import SensorError

PACKAGE_RANGE_UJ = 262_143_328_850
DRAM_RANGE_UJ = 65_712_999_613


def domain(root: Path, folder: str, name: str, energy_uj: int, range_uj: int | None = PACKAGE_RANGE_UJ) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    if range_uj is not None:
        (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Path]:
    """Two sockets with memory, and everything that must not be added to them."""
    (tmp_path / "intel-rapl").mkdir()
    return {
        "package-0": domain(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        "core": domain(tmp_path, "intel-rapl:0:0", "core", 1_000_000),
        "uncore": domain(tmp_path, "intel-rapl:0:1", "uncore", 1_000_000),
        "dram-0": domain(tmp_path, "intel-rapl:0:2", "dram", 1_000_000, DRAM_RANGE_UJ),
        "package-1": domain(tmp_path, "intel-rapl:1", "package-1", 1_000_000),
        "psys": domain(tmp_path, "intel-rapl:2", "psys", 1_000_000),
        "mmio": domain(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000),
    }


def advance(path: Path, delta_uj: int) -> None:
    counter = path / "energy_uj"
    counter.write_text(f"{int(counter.read_text()) + delta_uj}\n")


def read_mj(source: RaplSource) -> int | None:
    return source.read()[source.devices[0].uuid]


def test_packages_and_memory_are_summed_and_nothing_else(tmp_path, tree):
    """package + dram count; core, uncore, psys and the mmio copy are inside or the same domain twice."""
    source = RaplSource(tmp_path)
    assert read_mj(source) == 0
    amounts = {"package-0": 7, "core": 100, "uncore": 1000, "dram-0": 30, "package-1": 500, "psys": 9000, "mmio": 7}
    for name, joules in amounts.items():
        advance(tree[name], joules * 1_000_000)
    assert read_mj(source) == (7 + 30 + 500) * 1000
    device = source.devices[0]
    assert (device.source, device.scope, device.kind) == ("rapl", "node", "cpu")
    assert device.name == "package-0 + package-0/dram + package-1"


def test_the_children_inside_a_folder_are_found_and_counted_once(tmp_path):
    """sysfs shows a child beside its parent and inside it: one domain."""
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    memory = domain(tmp_path, "intel-rapl:0/intel-rapl:0:0", "dram", 0)
    (tmp_path / "intel-rapl:0:0").symlink_to(memory)
    source = RaplSource(tmp_path)
    advance(memory, 3_000_000)
    assert read_mj(source) == 3000


def test_one_wrap_between_reads_is_undone(tmp_path, tree):
    """A counter that starts again below its last value went through its own range, memory's is another."""
    (tree["package-0"] / "energy_uj").write_text(f"{PACKAGE_RANGE_UJ - 2_000_000}\n")
    (tree["dram-0"] / "energy_uj").write_text(f"{DRAM_RANGE_UJ - 1_000_000}\n")
    source = RaplSource(tmp_path)
    (tree["package-0"] / "energy_uj").write_text("3000000\n")
    (tree["dram-0"] / "energy_uj").write_text("4000000\n")
    assert read_mj(source) == (2 + 3 + 1 + 4) * 1000


def test_a_wrap_of_unknown_range_is_a_failed_read_not_a_negative_number(tmp_path):
    """The one interval is given up; the next is good again."""
    path = domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000, range_uj=None)
    source = RaplSource(tmp_path)
    (path / "energy_uj").write_text("1000000\n")
    assert read_mj(source) is None
    assert "max_energy_range_uj" in source.failures[source.devices[0].uuid]
    advance(path, 2_000_000)
    assert read_mj(source) == 2000


def test_a_counter_that_vanishes_is_a_failed_read(tmp_path, tree):
    """Half a host is no host: one missing domain makes the sum unknown."""
    source = RaplSource(tmp_path)
    (tree["package-1"] / "energy_uj").unlink()
    assert read_mj(source) is None


def test_without_rapl_the_host_is_estimated_and_says_why(tmp_path):
    """No package domain: SensorError when asked for by name, an estimate with the reason otherwise."""
    with pytest.raises(SensorError, match="no RAPL package domain"):
        RaplSource(tmp_path)
    device = select_sources(powercap_root=tmp_path)[0].devices[0]
    assert device.source == "estimate:tdp"
    assert "no RAPL package domain" in device.note


def test_rapl_is_preferred_when_readable(tmp_path, tree):
    assert select_sources(powercap_root=tmp_path)[0].devices[0].source == "rapl"


def test_a_root_only_counter_is_not_available_and_says_so(tmp_path, tree):
    """As nobody, with mode 0400 files as kernels since 5.10 have them: an estimate whose note names the file."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user who may not read the counter")
    for name in ("package-0", "package-1"):
        (tree[name] / "energy_uj").chmod(0o400)
    for folder in [tmp_path, *tmp_path.parents]:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)
    code = f"""
        import os
        from pathlib import Path
        from moe.energy import select_sources
        os.setgid(65534); os.setuid(65534)
        device = select_sources(powercap_root=Path({str(tmp_path)!r}))[0].devices[0]
        print(device.source, device.note)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("estimate:tdp no sensor: ")
    assert "may only be read by root" in out.stdout
