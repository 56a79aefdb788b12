"""Hosts that tell their energy otherwise than by RAPL: Cray's node counters, Grace's power meters, in a sysfs tree."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe.energy import select_sources
from moe.energy.sources import GraceSource, PmCounters, host_source, node_counter
from moe.errors import SensorError


@pytest.fixture
def sys_root(tmp_path: Path) -> Path:
    """An empty sysfs."""
    return tmp_path / "sys"


def cray(sys_root: Path, energy: str = "81147367 J 1700061210920464 us\n") -> Path:
    folder = sys_root / "cray" / "pm_counters"
    folder.mkdir(parents=True)
    (folder / "energy").write_text(energy)
    return folder


def meter(sys_root: Path, number: int, name: str, watts: float) -> Path:
    """One ACPI power meter."""
    folder = sys_root / "class" / "hwmon" / f"hwmon{number}" / "device"
    folder.mkdir(parents=True)
    (folder / "power1_oem_info").write_text(f"{name}\n")
    (folder / "power1_average").write_text(f"{round(watts * 1e6)}\n")
    (folder / "power1_average_interval").write_text("50\n")
    return folder


@pytest.fixture
def grace(sys_root: Path) -> list[Path]:
    """Two sockets of 200 W; their parts and the module they sit on must not be added."""
    sockets = [meter(sys_root, n, f"Grace Power Socket {n}", 200) for n in range(2)]
    meter(sys_root, 2, "CPU Power Socket 0", 150)
    meter(sys_root, 3, "SysIO Power Socket 0", 30)
    meter(sys_root, 4, "Module Power Socket 0", 700)
    return sockets


def test_the_nodes_counter_is_read_in_joules(sys_root):
    """The number before J, in millijoules; the time behind it is not needed."""
    folder = cray(sys_root)
    (folder / "raw_scan_hz").write_text("4\n")
    (source,) = select_sources(sys_root=sys_root)
    device = source.devices[0]
    assert source.read() == {device.uuid: 81_147_367_000}
    assert (device.source, device.scope, device.tick_s) == ("node:pm_counters", "node", 0.25)
    assert device.note == "the whole node, its accelerators inside"


@pytest.mark.parametrize("content", ["", "N/A\n"])
def test_a_counter_without_a_number_is_a_failed_read(sys_root, content):
    """At first it is no sensor; later a gap."""
    folder = cray(sys_root)
    source = PmCounters(folder)
    (folder / "energy").write_text(content)
    assert source.read() == {source.devices[0].uuid: None}
    assert source.failures
    with pytest.raises(SensorError, match="energy cannot be read"):
        PmCounters(folder)
    assert node_counter(sys_root) is None


def test_a_node_counter_that_stands_still_is_a_failed_read(sys_root, monkeypatch):
    """A node that is on draws power: after two seconds the same number is no 0 J."""
    now_ns = 10**9
    monkeypatch.setattr("moe.energy.sources.standstill.boottime_ns", lambda: now_ns)
    folder = cray(sys_root)
    source = PmCounters(folder)
    uuid = source.devices[0].uuid
    assert source.read() == {uuid: 81_147_367_000}
    now_ns += 2_100_000_000
    assert source.read() == {uuid: None}
    (folder / "energy").write_text("81147368 J\n")
    assert source.read() == {uuid: 81_147_368_000}


def test_grace_sockets_are_integrated_and_nothing_twice(sys_root, grace):
    """2 x 200 W; the CPU and SysIO rails are inside, the module would be the GPU as well."""
    source = GraceSource(sys_root / "class" / "hwmon")
    device = source.devices[0]
    source.read()
    start = time.monotonic()
    time.sleep(0.3)
    energy_mj = source.read()[device.uuid]
    assert energy_mj / 1000 / (time.monotonic() - start) == pytest.approx(400, rel=0.05)
    assert (device.source, device.scope, device.name) == ("integrated", "node", "Grace x 2")


@pytest.mark.parametrize(
    ("interval_ms", "expected", "expected_j"),
    [(50, (1.0, 0.05, 0.20), 600), (1000, (1.0, 1.0, 0.10), 800), (2000, (2.0, 1.0, 0.10), 800)],
    ids=["less than a read", "a read", "more than a read"],
)
def test_what_grace_averages_over_says_what_is_seen(sys_root, grace, monkeypatch, interval_ms, expected, expected_j):
    """Tick, share seen and band; 400 W, then 800 W: a trapezoid of moments, or a mean of the last second."""
    now_ns = iter((0, 10**9))
    monkeypatch.setattr("moe.energy.sources.integral.boottime_ns", lambda: next(now_ns))
    for socket in grace:
        (socket / "power1_average_interval").write_text(f"{interval_ms}\n")
    source = GraceSource(sys_root / "class" / "hwmon")
    (device,) = source.devices
    assert (device.tick_s, device.seen, device.band) == expected
    source.read()
    for socket in grace:
        (socket / "power1_average").write_text(f"{400 * 10**6}\n")
    assert source.read() == {device.uuid: expected_j * 1000}


def test_half_the_sockets_are_no_host(sys_root, grace):
    source = GraceSource(sys_root / "class" / "hwmon")
    (grace[1] / "power1_average").unlink()
    assert list(source.read().values()) == [None]


def test_the_widest_sensor_is_taken(sys_root, grace):
    """The node's counter before Grace's meters before RAPL; an estimate that says why where there is none."""
    assert isinstance(host_source(sys_root), GraceSource)
    cray(sys_root)
    assert isinstance(host_source(sys_root), PmCounters)
    bare = host_source(sys_root / "nothing")
    assert bare.devices[0].source == "estimate:tdp"
    assert "has no RAPL package domain" in bare.devices[0].note


def test_a_sysfs_nobody_may_look_into_is_a_host_without_sensors(sys_root):
    """As in a container that hides /sys/class from its user."""
    if os.getuid() != 0:
        pytest.skip("runs where the tests are root's, as in a container: they become a user who may not look")
    meter(sys_root, 0, "Grace Power Socket 0", 200)
    sys_root.chmod(0o700)
    code = f"""
        import os
        from pathlib import Path
        from moe.energy.sources import host_source
        os.setgid(65534); os.setuid(65534)
        print(host_source(Path({str(sys_root)!r})).devices[0].source)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert out.stdout == "estimate:tdp\n"
