"""Ledgers of several nodes, and of segments whose clocks differ, written by hand."""

from pathlib import Path

import pytest

from moe.energy import fold_ledgers
from moe.errors import LedgerError

from .scribe import A, B, S, Scribe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_nodes_add_up_each_on_its_own_clock(tmp_path, path):
    """Two nodes booted at different times: the same moment, found through UTC."""
    other = tmp_path / "ledger.node1.jsonl"
    first, second = Scribe(path, 1000), Scribe(other, 5, devices=(B,), boot="boot-2")
    for scribe, start_s, device in ((first, 1000, A), (second, 5, B)):
        scribe.read(start_s, 0, device)
        scribe.read(start_s + 10, 1_000_000, device)
        scribe.end(start_s + 10)
    fold = fold_ledgers([path, other])
    assert fold.total.energy_mj == 2_000_000
    assert fold.total.device_hours == pytest.approx(20 / 3600)
    energy_j, hours = fold.at(0, 1005 * S)
    assert energy_j == pytest.approx(1000, abs=5)  # the two segment lines were written milliseconds apart
    assert hours == pytest.approx(10 / 3600, rel=0.005)


@pytest.fixture
def utc(monkeypatch):
    """`utc(n)`: ledger lines are now written n seconds into the first of January."""

    def at(second: int) -> None:
        time = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        monkeypatch.setattr("moe.energy.ledger.utc_now", lambda: f"2026-01-01T{time}.000000Z")

    return at


def write_node(path: Path, start_s: float, *, device: str, boot: str) -> None:
    """A segment of 10 s at 100 W."""
    scribe = Scribe(path, start_s, devices=(device,), boot=boot)
    scribe.read(start_s, 0, device)
    scribe.read(start_s + 10, 1_000_000, device)
    scribe.end(start_s + 10)


def test_a_node_that_joins_later_costs_nothing_before_and_its_share_after(tmp_path, path, utc):
    """One node for 10 s, then two: the second's first segment runs beside the first's second, up to the same UTC."""
    other = tmp_path / "ledger.node1.jsonl"
    utc(1000)
    write_node(path, 500, device=A, boot="boot-1")
    utc(1020)
    write_node(path, 520, device=A, boot="boot-1")
    write_node(other, 7, device=B, boot="boot-2")
    fold = fold_ledgers([path, other])
    assert fold.at(0, 505 * S) == pytest.approx((500, 5 / 3600))
    assert fold.at(0, 510 * S) == pytest.approx((1000, 10 / 3600))
    assert fold.at(1, 525 * S) == pytest.approx((2000, 20 / 3600))
    assert fold.at(1, 530 * S) == pytest.approx((fold.total.energy_j, fold.total.device_hours))
    assert fold.devices_at_once == 2


def test_devices_a_run_moved_between_are_not_held_at_once(path, utc):
    """A GPU, then two others: two at once, though three were used."""
    utc(1000)
    write_node(path, 500, device=A, boot="boot-1")
    utc(1020)
    scribe = Scribe(path, 520, devices=(B, "GPU-c"))
    scribe.end(530)
    assert fold_ledgers([path]).devices_at_once == 2


def test_a_clock_set_back_between_two_segments_makes_one_device_not_two(path, utc):
    """The second segment is dated inside the first: boottime orders them, and a device is not held twice."""
    utc(1000)
    write_node(path, 500, device=A, boot="boot-1")
    utc(1005)
    write_node(path, 520, device=A, boot="boot-1")
    fold = fold_ledgers([path])
    assert fold.devices_at_once == 1
    assert (fold.total.energy_mj, fold.total.device_hours) == (2_000_000, 20 / 3600)
    assert fold.at(1, 525 * S) == pytest.approx((1500, 15 / 3600))


def test_a_node_that_restarts_more_often_is_priced_by_the_clock(tmp_path, path, utc):
    """The first node goes on in one segment while the other has two: both count up to the moment asked for."""
    other = tmp_path / "ledger.node1.jsonl"
    utc(1000)
    scribe = Scribe(path, 500)
    scribe.read(500, 0)
    scribe.read(530, 3_000_000)
    scribe.end(530)
    write_node(other, 7, device=B, boot="boot-2")
    utc(1020)
    write_node(other, 27, device=B, boot="boot-2")
    fold = fold_ledgers([path, other])
    assert fold.at(0, 515 * S) == pytest.approx((1500 + 1000, (15 + 10) / 3600))
    assert fold.at(0, 525 * S) == pytest.approx((2500 + 1500, (25 + 15) / 3600))


def test_a_ledger_that_lacks_the_segment_is_named(tmp_path, path, utc):
    """The clock of a moment is the first ledger's: another node's that has the segment does not stand in for it."""
    other = tmp_path / "ledger.node1.jsonl"
    for second in (1000, 1020):
        utc(second)
        write_node(other, second, device=B, boot="boot-2")
    write_node(path, 500, device=A, boot="boot-1")
    with pytest.raises(LedgerError, match=r"ledger\.jsonl has no segment 1"):
        fold_ledgers([path, other]).at(1, 1025 * S)
