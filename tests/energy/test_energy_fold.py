"""Folding ledgers written by hand, whose totals are known to the millijoule."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest

from moe.energy import fold_ledgers
from moe.energy.timeline import apportion
from moe.errors import LedgerError

from .scribe import A, B, S, Scribe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_apportion_gives_largest_remainders_first_and_loses_nothing():
    """The docstring's four numbers, and sums that hold for any weights."""
    assert apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert apportion(7, {}) == {"unattributed": 7}
    rng = random.Random(0)
    for _ in range(200):
        weights = {str(i): rng.randrange(1, 10**10) for i in range(rng.randrange(1, 8))}
        total = rng.randrange(10**6)
        parts = apportion(total, weights)
        assert sum(parts.values()) == total
        assert all(abs(parts[name] - total * w / sum(weights.values())) < 1 for name, w in weights.items())


def test_phases_share_each_interval_by_time_and_sum_to_the_total(path):
    """10 s at 100 W and 10 s at 300 W; the second half is half forward, half evaluation."""
    scribe = Scribe(path, 100)
    scribe.read(100, 7_000)
    scribe.mark(110, 5, forward_backward=10.0)
    scribe.read(110, 7_000 + 1_000_000)
    scribe.mark(120, 8, forward_backward=5.0, evaluation=5.0)
    scribe.read(120, 7_000 + 4_000_000)
    scribe.end(120)
    fold = fold_ledgers([path])
    assert fold.total.energy_mj == 4_000_000
    assert fold.phases["forward_backward"].energy_mj == 2_500_000
    assert fold.phases["evaluation"].energy_mj == 1_500_000
    assert fold.phases["forward_backward"].elapsed_s == 15
    assert fold.phases["unattributed"].energy_mj == 0
    assert fold.total.useful_energy_j == pytest.approx(2500)
    assert fold.total.device_hours == 20 / 3600
    assert fold.total.useful_device_hours == pytest.approx(15 / 3600)
    assert fold.total.coverage == 1.0
    assert (fold.total.source, fold.total.scope, fold.total.measured) == ("counter", "gpu", True)
    assert fold.total.band_j == pytest.approx(0.05 * 4000 + 2 * 0.1 * 700)


def test_uneven_numbers_sum_exactly_over_devices_and_phases(path):
    """Random counters and phases at random moments: integers all the way."""
    rng = random.Random(1)
    scribe = Scribe(path, 0, devices=(A, B))
    counters, at_s = {A: 123, B: 456}, 0.0
    for device, energy_mj in counters.items():
        scribe.read(at_s, energy_mj, device)
    for step in range(300):
        length_s = rng.uniform(0.3, 2.0)
        at_s += length_s
        cut = sorted(rng.uniform(0, length_s) for _ in range(2))
        phases = {"data": cut[0], "forward_backward": cut[1] - cut[0], "optimizer": length_s - cut[1]}
        scribe.mark(at_s - rng.uniform(0, 0.2), step, **phases)
        for device in counters:
            counters[device] += rng.randrange(1_000_000)
            scribe.read(at_s, counters[device], device)
    scribe.end(at_s)
    fold = fold_ledgers([path])
    truth_mj = counters[A] - 123 + counters[B] - 456
    assert fold.total.energy_mj == truth_mj
    assert sum(phase.energy_mj for phase in fold.phases.values()) == truth_mj
    assert sum(round(device.energy_j * 1000) for device in fold.devices) == truth_mj


def test_steps_that_a_resume_threw_away_are_not_useful(path):
    """Killed at step 10, resumed from the checkpoint at 6: four steps' time was lost, all energy counts."""
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.mark(6, 6, forward_backward=6.0)
    scribe.mark(10, 10, forward_backward=4.0)
    scribe.read(10, 1_000_000)
    scribe.close()
    scribe = Scribe(path, 12, resumed=6)
    scribe.read(12, 1_200_000)
    scribe.mark(20, 14, forward_backward=7.0, checkpoint=1.0)
    scribe.read(20, 2_000_000)
    scribe.end(20)
    fold = fold_ledgers([path])
    assert fold.total.energy_mj == 2_000_000
    assert fold.total.useful_device_hours == pytest.approx((6 + 7) / 3600)
    assert fold.total.useful_energy_j == pytest.approx(600 + 700)
    assert fold.total.device_hours == pytest.approx((10 + 8) / 3600)
    assert fold.total.unattributed_j == 200
    assert [segment.ended for segment in fold.segments] == ["lost", "end"]
    assert fold.phases["unattributed"].energy_mj == 200_000


def test_energy_of_a_step_is_apportioned_and_says_so(path):
    """Steps of 0.1 s between readings a second apart: the mean of the surviving 26, and how it came about."""
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.mark(1, 10, forward_backward=1.0)
    scribe.read(1, 500_000)
    scribe.mark(2, 20, forward_backward=0.5, evaluation=0.5)
    scribe.read(2, 1_100_000)
    scribe.close()
    scribe = Scribe(path, 4, resumed=16)
    scribe.read(4, 1_300_000)
    scribe.mark(5, 26, forward_backward=1.0)
    scribe.read(5, 2_000_000)
    scribe.end(5)
    fold = fold_ledgers([path])
    assert fold.per_step.num_steps == 26
    assert fold.per_step.energy_j == pytest.approx((500 + 0.6 * 300 + 700) / 26)
    told = fold.to_json()["per_step"]
    assert told["method"] == "apportioned: the energy between two readings, shared out by time"
    done = subprocess.run(
        [sys.executable, "-m", "moe.cli", "energy", "report", str(path)], capture_output=True, text=True, check=True
    )
    assert "a step 53.1 J, the mean of 26\nphases and steps are apportioned: the energy between" in done.stdout


def test_a_run_that_told_no_step_has_no_energy_of_one(path):
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.mark(1, command=1.0)
    scribe.read(1, 500_000)
    scribe.end(1)
    assert fold_ledgers([path]).to_json()["per_step"] is None


def test_the_band_holds_what_an_instant_power_sensor_did_not_see(path):
    """Reads of 25 ms in a second that scatter by 200 W: three standard errors of their sum; a counter has none."""
    rng = random.Random(1)
    reads_w = [500 + rng.choice((-200, 200)) for _ in range(401)]
    energies_mj = [0, *itertools.accumulate(500 * (a + b) for a, b in itertools.pairwise(reads_w))]
    for source, seen in (("integrated", 0.025), ("counter", 1.0)):
        path.unlink(missing_ok=True)
        scribe = Scribe(path, 0, source=source, seen=seen)
        for second, energy_mj in enumerate(energies_mj):
            scribe.read(second, energy_mj)
        scribe.end(400)
        total = fold_ledgers([path]).total
        unseen_j = total.band_j - 0.05 * total.energy_j - 2 * 0.1 * 700
        assert unseen_j == pytest.approx(3 * 200 * 400**0.5 if seen < 1 else 0, rel=0.15)


@pytest.mark.parametrize("apart_s", [1, 2, 3])
def test_the_band_holds_what_means_over_a_second_missed_that_were_read_rarely(path, apart_s):
    """A load that is switched at random: of forty runs of five minutes at most one is off by more than its band.

    Read each second such means tile the time: nothing is missed, and no band is wider for it.
    """
    rng, outside, notes = random.Random(apart_s), 0, set()
    for _ in range(40):
        path.unlink(missing_ok=True)
        power_w, powers_w = 300, []
        for _ in range(3000):  # of 0.1 s; a state lasts a second in the mean
            power_w = rng.choice((300, 700)) if rng.random() < 0.2 else power_w
            powers_w.append(power_w)
        scribe = Scribe(path, 0, source="integrated", seen=1.0, band=0.0, tick_s=0.0)
        scribe.read(0, 0)
        told_mj = 0.0
        for end in range(10 * apart_s, 3001, 10 * apart_s):
            told_mj += 1000 * apart_s * sum(powers_w[end - 10 : end]) / 10
            scribe.read(end / 10, told_mj)
        scribe.end(300)
        fold = fold_ledgers([path])
        notes |= set(fold.notes)
        outside += abs(fold.total.energy_j - sum(powers_w) / 10) > fold.total.band_j + 0.001
        assert (fold.total.band_j > 0) == (apart_s > 1)
    assert outside <= 1
    rare = f"{A}: its power was read every {apart_s:.1f} s, being dear or slow to read; the band holds what that missed"
    assert notes == ({rare} if apart_s > 1 else set())


def test_a_mark_across_the_cut_counts_in_proportion(path):
    """Steps 1-10 in one mark, resumed from 6: six tenths of its step time survive."""
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.mark(10, 10, forward_backward=10.0)
    scribe.read(10, 1_000_000)
    scribe.end(10)
    scribe = Scribe(path, 10, resumed=6)
    scribe.end(10)
    assert fold_ledgers([path]).total.useful_device_hours == pytest.approx(6 / 3600)


def test_a_reset_within_a_segment_is_a_hole_in_the_coverage(path):
    """The interval across the reset is left out; nothing negative, nothing guessed."""
    scribe = Scribe(path, 0)
    for at_s, energy_mj in [(0, 5_000_000), (10, 6_000_000), (20, 100_000), (30, 1_100_000)]:
        scribe.read(at_s, energy_mj)
    scribe.end(30)
    fold = fold_ledgers([path])
    assert fold.total.energy_mj == 2_000_000
    assert fold.total.coverage == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("source", "energy_mj", "coverage"), [("counter", 3_000_000, 1.0), ("integrated", 2_000_000, 2 / 3)]
)
def test_failed_reads_cost_a_counter_nothing_and_an_integral_its_interval(path, source, energy_mj, coverage):
    scribe = Scribe(path, 0, source=source)
    scribe.read(0, 0)
    scribe.read(10, 1_000_000)
    scribe.add("gap", 15, device=A, reason="lost", detail="GPU is lost")
    scribe.read(20, 2_000_000)
    scribe.read(30, 3_000_000)
    scribe.end(30)
    fold = fold_ledgers([path])
    assert fold.total.energy_mj == energy_mj
    assert fold.total.coverage == pytest.approx(coverage)


def test_cost_of_a_moment_is_interpolated_and_cumulative(path):
    """Half-way between readings half of the energy; earlier segments and lost joules included."""
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.read(10, 1_000_000)
    scribe.close()
    scribe = Scribe(path, 12, resumed=1)
    scribe.read(12, 1_200_000)
    scribe.read(22, 3_200_000)
    scribe.end(22)
    fold = fold_ledgers([path])
    assert fold.at(0, 5 * S) == (500.0, 5 / 3600)
    assert fold.at(1, 12 * S) == (1200.0, 10 / 3600)
    assert fold.at(1, 17 * S) == pytest.approx((2200.0, 15 / 3600))
    assert fold.at(1, 99 * S) == pytest.approx((fold.total.energy_j, fold.total.device_hours))
    with pytest.raises(LedgerError, match="segment 7"):
        fold.at(7, 0)


def test_an_estimate_in_the_total_makes_it_unmeasured_and_says_so(path):
    """A measured and an estimated segment: a sum per source, a headline that names both."""
    for start_s, source, energy_mj in ((0, "counter", 1_000_000), (10, "estimate:tdp", 2_000_000)):
        scribe = Scribe(path, start_s, source=source)
        scribe.read(start_s, 0)
        scribe.read(start_s + 10, energy_mj)
        scribe.end(start_s + 10)
    total = fold_ledgers([path]).total
    assert total.energy_by_source_j == {"counter": 1000.0, "estimate:tdp": 2000.0}
    assert (total.source, total.measured) == ("counter+estimate:tdp", False)
    assert "energy is time x declared power" in fold_ledgers([path]).notes


def test_a_run_that_read_nothing_has_no_energy_rather_than_zero(path):
    scribe = Scribe(path, 0)
    scribe.add("gap", 1, device=A, reason="lost", detail="GPU is lost")
    scribe.end(10)
    fold = fold_ledgers([path])
    assert fold.total.energy_j is None
    assert fold.at(0, 5 * S) == (None, 5 / 3600)
    assert fold.total.device_hours == 10 / 3600
    assert fold.total.coverage == 0.0


def test_the_json_has_the_contracts_keys(path):
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.read(10, 1_000_000)
    scribe.end(10)
    report = fold_ledgers([path]).to_json()
    assert list(report) == ["total", "devices", "phases", "per_step", "footprint", "segments"]
    needed = {"energy_j", "device_hours", "useful_device_hours", "band_j", "coverage", "unattributed_j", "scope"}
    assert needed <= report["total"].keys()
    assert {"uuid", "name", "source", "scope", "energy_j", "band_j", "coverage"} <= report["devices"][0].keys()
    assert report["total"]["unattributed_j"] == 1000.0
    assert report["phases"]["unattributed"] == {"energy_j": 1000.0, "elapsed_s": 0.0}


def test_tokens_are_those_of_the_final_lineage(path):
    """100 told, then resumed at step 0: what the second segment tells counts, and before it told anything, nothing."""
    scribe = Scribe(path, 0)
    scribe.add("mark", 5, phase="idle", step=10, tokens=100, phase_s={"idle": 5.0})
    scribe.close()
    assert fold_ledgers([path]).tokens == 100
    scribe = Scribe(path, 20)
    scribe.mark(25, None, idle=5.0)
    assert fold_ledgers([path]).tokens is None
    scribe.add("mark", 30, phase="idle", step=6, tokens=60, phase_s={"idle": 5.0})
    scribe.close()
    assert fold_ledgers([path]).tokens == 60
