"""The ends of a window: what is found between the reads around them, from samples made by hand."""

import pytest

from moe.energy.sources.base import Device
from moe.energy.sources.integral import PowerIntegral
from moe.energy.window import Edge, Sample, Window

MS = 10**6


def device(source: str = "counter", tick_s: float = 0.1, **changes) -> Device:
    return Device(uuid="G", name="fake", kind="gpu", source=source, scope="gpu", band=0.05, tick_s=tick_s, **changes)


def edge_at(thing: Device, at_ms: float, samples: list[tuple[float, int]]) -> Edge:
    """An edge that was offered these (milliseconds, millijoules)."""
    edge = Edge((thing,))
    edge.at_ns = round(at_ms * MS)
    for sample_ms, energy_mj in samples:
        edge.offer(Sample(round(sample_ms * MS), {"G": energy_mj}, {"G": 0}, {"G": 0.0}))
    return edge


def test_the_energy_at_an_edge_is_interpolated_in_the_tick_that_follows():
    """500 W: a tick between 57 and 60 ms after, so 41.5 % of its 50 J lie before the edge; at most a tick is open."""
    thing = device(p_max_w=700.0)
    edge = edge_at(thing, 1000, [(1000.5, 0), (1030, 0), (1057, 0), (1060, 50_000)])
    assert edge.energy_mj(thing) == (pytest.approx(0.415 * 50_000), 50_000)


def test_a_reader_that_comes_late_leaves_more_open():
    """First read 30 ms after the edge, next tick 110 ms after it: 10 ms lie in a tick that nobody saw."""
    thing = device(p_max_w=700.0)
    edge = edge_at(thing, 1000, [(1030, 0), (1109, 0), (1111, 20_000)])
    energy_mj, open_mj = edge.energy_mj(thing)
    assert energy_mj == pytest.approx(-2_000)  # as if the power had been the same
    assert open_mj == pytest.approx(20_000 + 0.010 * 700_000)


def test_an_edge_without_a_tick_is_open_by_a_tick_of_full_power():
    """And by what may have been used before the first read, a millisecond after the edge."""
    thing = device(p_max_w=700.0)
    edge = edge_at(thing, 1000, [(1001 + 5 * n, 7) for n in range(21)])
    assert edge.resolved.is_set()
    assert edge.energy_mj(thing) == (7.0, pytest.approx(70_700))


def test_integrated_power_has_no_tick_and_is_open_by_half_of_what_it_averages_over():
    """300 W since the edge, 2 ms before the first read; without a limit the power there stands for it."""
    thing = device("integrated", tick_s=1.0)
    edge = edge_at(thing, 1000, [(1002, 1_000), (1004, 1_600)])
    assert edge.resolved.is_set()
    assert edge.energy_mj(thing) == (pytest.approx(400), pytest.approx(150_000))


def test_an_end_without_a_tick_is_never_certain():
    """A node's counter tells no highest power: 3 kJ in ten seconds leave a tenth of 300 W open at each end."""
    thing = device("node:pm_counters")
    window = Window("work", (thing,), lambda edge: None)
    with window:
        pass
    window._start = edge_at(thing, 0, [(5 * n, 0) for n in range(22)])
    window._end = edge_at(thing, 10_000, [(10_000 + 5 * n, 3_000_000) for n in range(22)])
    assert window.by_device == {"G": (pytest.approx(3000), pytest.approx(0.05 * 3000 + 2 * 30))}


def test_a_window_tells_each_device_and_their_sum():
    """Two devices over 10 s; one that could not be read at the end is in neither."""
    things = tuple(
        Device(uuid=uuid, name="fake", kind="gpu", source="counter", scope="gpu", band=0.05, tick_s=0.1, p_max_w=700.0)
        for uuid in "ABC"
    )
    window = Window("work", things, lambda edge: None)
    with window:
        pass
    for edge, at_s, energies in ((window._start, 0, (0, 0, 0)), (window._end, 10, (4_000_000, 1_000_000, None))):
        edge.at_ns = at_s * 1000 * MS
        for ms, tick in ((1, 0), (50, 10_000), (101, 10_000)):
            told = {uuid: None if mj is None else mj + tick for uuid, mj in zip("ABC", energies, strict=True)}
            edge.offer(Sample(edge.at_ns + ms * MS, told, {}, {}))
    assert window.elapsed_s == 10
    assert {uuid: pytest.approx(j) for uuid, (j, _) in window.by_device.items()} == {"A": 4000, "B": 1000}
    assert window.energy_j == pytest.approx(5000)
    assert window.band_j == pytest.approx(0.05 * 5000 + 4 * 10)


@pytest.mark.parametrize(("trailing", "expected_j"), [(True, 700), (False, 550)])
def test_a_trailing_mean_is_taken_for_the_time_before_the_read(monkeypatch, trailing, expected_j):
    """100 W, then 300 and 400 W as means of the seconds before: 700 J, of which a trapezoid loses the change."""
    now_ns = iter(range(0, 4 * 10**9, 10**9))
    monkeypatch.setattr("moe.energy.sources.integral.boottime_ns", lambda: next(now_ns))
    integral = PowerIntegral(trailing=trailing)
    *_, energy_mj = (integral.add(power_w * 1000) for power_w in (100, 300, 400))
    assert energy_mj == expected_j * 1000


def test_power_is_not_stretched_over_a_time_nobody_looked_at(monkeypatch):
    """Reads 5.1 s apart are a gap, for a mean over a second and for a power of the moment."""
    for trailing in (True, False):
        now_ns = iter((0, 5_000_000_000, 10_100_000_000))
        monkeypatch.setattr("moe.energy.sources.integral.boottime_ns", lambda now_ns=now_ns: next(now_ns))
        integral = PowerIntegral(trailing=trailing)
        integral.add(100_000)
        assert integral.add(100_000) == 500_000
        with pytest.raises(ValueError, match=r"no power read for 5\.1 s"):
            integral.add(100_000)
