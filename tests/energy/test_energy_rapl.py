"""Processor energy from a powercap tree: which domains count, wraps, and what may not be read."""

import os
import subprocess
import sys
import textwrap
import time
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
def root(tmp_path: Path) -> Path:
    """The powercap folder of a machine's sysfs, which may lie anywhere."""
    folder = tmp_path / "sys" / "class" / "powercap"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def tree(root: Path) -> dict[str, Path]:
    """Two sockets with memory, and everything that must not be added to them."""
    (root / "intel-rapl").mkdir()
    return {
        "package-0": domain(root, "intel-rapl:0", "package-0", 1_000_000),
        "core": domain(root, "intel-rapl:0:0", "core", 1_000_000),
        "uncore": domain(root, "intel-rapl:0:1", "uncore", 1_000_000),
        "dram-0": domain(root, "intel-rapl:0:2", "dram", 1_000_000, DRAM_RANGE_UJ),
        "package-1": domain(root, "intel-rapl:1", "package-1", 1_000_000),
        "psys": domain(root, "intel-rapl:2", "psys", 1_000_000),
        "mmio": domain(root, "intel-rapl-mmio:0", "package-0", 1_000_000),
    }


def advance(path: Path, delta_uj: int) -> None:
    counter = path / "energy_uj"
    counter.write_text(f"{int(counter.read_text()) + delta_uj}\n")


def read_mj(source: RaplSource) -> int | None:
    return source.read()[source.devices[0].uuid]


def test_packages_and_memory_are_summed_and_nothing_else(root, tree):
    """package + dram count; core, uncore, psys and the mmio copy are inside or the same domain twice."""
    source = RaplSource(root)
    assert read_mj(source) == 0
    amounts = {"package-0": 7, "core": 100, "uncore": 1000, "dram-0": 30, "package-1": 500, "psys": 9000, "mmio": 7}
    for name, joules in amounts.items():
        advance(tree[name], joules * 1_000_000)
    assert read_mj(source) == (7 + 30 + 500) * 1000
    device = source.devices[0]
    assert (device.source, device.scope, device.kind) == ("rapl", "node", "cpu")
    assert device.name == "package-0 + package-0/dram + package-1"


def test_the_children_inside_a_folder_are_found_and_counted_once(root):
    """sysfs shows a child beside its parent and inside it: one domain."""
    domain(root, "intel-rapl:0", "package-0", 0)
    memory = domain(root, "intel-rapl:0/intel-rapl:0:0", "dram", 0)
    (root / "intel-rapl:0:0").symlink_to(memory)
    source = RaplSource(root)
    advance(memory, 3_000_000)
    assert read_mj(source) == 3000


def test_one_wrap_between_reads_is_undone(root, tree):
    """A counter that starts again below its last value went through its own range, memory's is another."""
    (tree["package-0"] / "energy_uj").write_text(f"{PACKAGE_RANGE_UJ - 2_000_000}\n")
    (tree["dram-0"] / "energy_uj").write_text(f"{DRAM_RANGE_UJ - 1_000_000}\n")
    source = RaplSource(root)
    (tree["package-0"] / "energy_uj").write_text("3000000\n")
    (tree["dram-0"] / "energy_uj").write_text("4000000\n")
    assert read_mj(source) == (2 + 3 + 1 + 4) * 1000


def test_a_wrap_of_unknown_range_is_a_failed_read_not_a_negative_number(root):
    """The one interval is given up; the next is good again."""
    path = domain(root, "intel-rapl:0", "package-0", 5_000_000, range_uj=None)
    source = RaplSource(root)
    (path / "energy_uj").write_text("1000000\n")
    assert read_mj(source) is None
    assert "max_energy_range_uj" in source.failures[source.devices[0].uuid]
    advance(path, 2_000_000)
    assert read_mj(source) == 2000


def test_a_counter_that_vanishes_is_a_failed_read(root, tree):
    """Half a host is no host: one missing domain makes the sum unknown."""
    source = RaplSource(root)
    (tree["package-1"] / "energy_uj").unlink()
    assert read_mj(source) is None


def test_an_interval_that_may_hold_two_wraps_is_a_failed_read(root):
    """A 2 J range can wrap every 2 ms at 1 kW: after 20 ms nobody knows, and the next interval is good again."""
    path = domain(root, "intel-rapl:0", "package-0", 1_000_000, range_uj=2_000_000)
    source = RaplSource(root)
    time.sleep(0.02)
    assert read_mj(source) is None
    assert "may have wrapped more than once" in source.failures[source.devices[0].uuid]
    (path / "max_energy_range_uj").write_text(f"{PACKAGE_RANGE_UJ}\n")
    source = RaplSource(root)
    advance(path, 500_000)
    assert read_mj(source) == 500


def test_a_host_that_counts_nothing_for_two_seconds_is_a_failed_read(root, tree, monkeypatch):
    """Processors always draw power: a sum that stands still is no 0 J, and one domain that moves is enough."""
    now_ns = 10**9
    monkeypatch.setattr("moe.energy.sources.standstill.boottime_ns", lambda: now_ns)
    source = RaplSource(root)
    assert read_mj(source) == 0
    now_ns += 2_100_000_000
    assert read_mj(source) is None
    assert source.failures[source.devices[0].uuid] == "the energy counter has not moved for 2.1 s"
    advance(tree["dram-0"], 4_000_000)
    assert read_mj(source) == 4000


def test_the_mmio_interface_counts_where_it_is_the_only_one(root):
    """Some machines show the package there alone; its memory is found beside it."""
    package = domain(root, "intel-rapl-mmio:0", "package-0", 0)
    memory = domain(root, "intel-rapl-mmio:0:0", "dram", 0)
    domain(root, "intel-rapl-mmio:0:1", "core", 0)
    source = RaplSource(root)
    advance(package, 5_000_000)
    advance(memory, 1_000_000)
    assert read_mj(source) == 6000


def test_two_dies_count_each_unless_one_mirrors_the_other(root):
    """Dies with counters of their own are added; a die that shows its neighbour's number is the same energy."""
    dies = [domain(root, f"intel-rapl:{die}", f"package-0-die-{die}", die * 50_000_000) for die in range(2)]
    mirror = domain(root, "intel-rapl:2", "package-0-die-2", 50_000_300)
    far = domain(root, "intel-rapl:3", "package-1-die-0", 50_000_300)
    source = RaplSource(root)
    for path in (*dies, mirror, far):
        advance(path, 3_000_000)
    assert read_mj(source) == 9000
    assert source.devices[0].name == "package-0-die-0 + package-0-die-1 + package-1-die-0"


def test_without_rapl_the_host_is_estimated_and_says_why(root):
    """No package domain: SensorError when asked for by name, an estimate with the reason otherwise."""
    with pytest.raises(SensorError, match="no RAPL package domain"):
        RaplSource(root)
    device = select_sources(sys_root=root.parents[1])[0].devices[0]
    assert device.source == "estimate:tdp"
    assert "no RAPL package domain" in device.note


def test_rapl_is_preferred_when_readable(root, tree):
    assert select_sources(sys_root=root.parents[1])[0].devices[0].source == "rapl"


def test_a_root_only_counter_is_not_available_and_says_so(root, tree):
    """As nobody, with mode 0400 files as kernels since 5.10 have them: an estimate whose note names the file."""
    if os.getuid() != 0:
        pytest.skip(
            "runs where the tests are root's, as in a container: they become a user who may not read the counter"
        )
    for name in ("package-0", "package-1"):
        (tree[name] / "energy_uj").chmod(0o400)
    for folder in [root, *root.parents]:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)
    code = f"""
        import os
        from pathlib import Path
        from moe.energy import select_sources
        os.setgid(65534); os.setuid(65534)
        device = select_sources(sys_root=Path({str(root.parents[1])!r}))[0].devices[0]
        print(device.source, device.note)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("estimate:tdp no sensor: ")
    assert "may only be read by root" in out.stdout
