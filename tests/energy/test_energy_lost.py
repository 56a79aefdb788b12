"""What killed processes used after their last readings, in ledgers written by hand."""

from pathlib import Path

import pytest

from moe.energy import fold_ledgers
from moe.energy.file_fold import FileFold
from moe.energy.ledger import read_ledger

from .scribe import A, B, S, Scribe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.mark.parametrize(
    ("gap_s", "boot", "first_mj", "ended", "expected_mj"),
    [
        pytest.param(3, "boot-1", 1_300_000, False, 300_000, id="counter goes on"),
        pytest.param(50, "boot-1", 6_000_000, False, 500_000, id="at most one flush interval of a long gap"),
        pytest.param(3, "boot-2", 1_300_000, False, 0, id="a new boot is a reset"),
        pytest.param(3, "boot-1", 900_000, False, 0, id="a counter below its last value is a reset"),
        pytest.param(3, "boot-1", 1_300_000, True, 0, id="after a clean end nothing was lost"),
    ],
)
def test_what_a_kill_loses_is_unattributed_only_when_the_counter_tells(path, gap_s, boot, first_mj, ended, expected_mj):
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.mark(10, forward_backward=10.0)
    scribe.read(10, 1_000_000)
    if ended:
        scribe.end(10)
    scribe.close()
    scribe = Scribe(path, 10 + gap_s, boot=boot)
    scribe.read(10 + gap_s, first_mj)
    scribe.mark(20 + gap_s, forward_backward=10.0)
    scribe.read(20 + gap_s, first_mj + 1_000)
    scribe.end(20 + gap_s)
    fold = fold_ledgers([path])
    assert round(fold.total.unattributed_j * 1000) == expected_mj
    assert fold.total.energy_mj == 1_000_000 + expected_mj + 1_000


@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
def test_a_process_killed_before_its_first_reading_hides_nothing_of_the_one_before(path, boot):
    """Killed at 10 s, again at 12 s with a segment line alone, gone on at 13 s: the same boot's joules are told."""
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.read(10, 1_000_000)
    scribe.close()
    Scribe(path, 12, resumed=3).close()
    scribe = Scribe(path, 13, boot=boot)
    scribe.read(13, 1_300_000)
    scribe.read(20, 2_000_000)
    scribe.end(20)
    fold = fold_ledgers([path])
    lost_j = [segment.unattributed_j for segment in fold.segments]
    notes = [note for note in fold.notes if "is not known" in note]
    if boot == "boot-1":
        assert (fold.total.energy_mj, lost_j, notes) == (2_000_000, [0, 0, 300], [])
        assert fold.at(2, 13 * S) == (1300.0, 10 / 3600)
    else:
        assert (fold.total.energy_mj, lost_j) == (1_700_000, [0, 0, 0])
        assert notes == [f"what segment {number} used after its last reading is not known" for number in (0, 1)]
    assert sum(phase.energy_mj for phase in fold.phases.values()) == fold.total.energy_mj


def test_what_a_kill_lost_is_told_when_its_device_is_read_again(path):
    """Killed on A, gone on for a while on B, then on A again: of fourteen seconds at 100 W, five are billed."""
    for start_s, device, first_mj in ((0, A, 0), (12, B, 50_000_000), (24, A, 2_400_000)):
        scribe = Scribe(path, start_s, devices=(device,))
        scribe.read(start_s, first_mj, device)
        scribe.read(start_s + 10, first_mj + 1_000_000, device)
        if device == B:
            scribe.end(start_s + 10)
        scribe.close()
    fold = fold_ledgers([path])
    assert [segment.unattributed_j for segment in fold.segments] == [0, 0, 500]
    assert fold.total.energy_mj == 3_500_000


class CountedSegments(list):
    """A list that counts how often one of its items was looked at."""

    looks = 0

    def __getitem__(self, position):
        self.looks += 1
        return super().__getitem__(position)


def test_a_ledger_of_many_restarts_is_folded_in_one_pass(path):
    """A hundred processes killed before their first reading: the one that read is known, not searched for each time."""
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.read(10, 1_000_000)
    scribe.close()
    for number in range(100):
        Scribe(path, 11 + number / 100).close()
    scribe = Scribe(path, 13)
    scribe.read(13, 1_300_000)
    scribe.end(13)
    file = FileFold(path, CountedSegments())
    for record in read_ledger(path):
        if record["kind"] == "reading" and record["segment"] == 101:
            assert file.lost(101) == []  # fed live: what is lost is told from the first reading on
        file.feed(record)
    file.segments.looks = 0
    assert [(lost.position, lost.energy_mj) for lost in file.lost(101)] == [(0, 300_000)]
    assert file.energy_mj == 1_300_000
    assert file.segments.looks < 10 * len(file.segments)


class CountedHeader(dict):
    """A segment line that counts how often it was asked where its lineage goes on from."""

    looks = 0

    def __getitem__(self, name):
        CountedHeader.looks += name == "resumed_step"
        return super().__getitem__(name)


@pytest.mark.parametrize("back", [0, 3], ids=["redoing nothing", "redoing three steps each"])
def test_the_lineage_of_many_restarts_is_found_in_one_pass(path, back):
    """A hundred segments of ten steps each: every one is asked a few times, not once for each segment before it."""
    num, apart = 100, 10 - back
    for number in range(num):
        scribe = Scribe(path, number, resumed=apart * number)
        scribe.mark(number + 0.5, step=apart * number + 10, forward_backward=0.5)
        scribe.close()
    file = FileFold.read(path)
    for segment in file.segments:
        segment.header = CountedHeader(segment.header)
    CountedHeader.looks = 0
    assert file.lineage_ends() == [*range(apart, apart * num, apart), apart * (num - 1) + 10]
    assert CountedHeader.looks < 4 * num


@pytest.mark.parametrize(("lost_mj", "told"), [(10_000, False), (300_000, True)])
def test_the_report_says_when_much_energy_belongs_to_no_phase(path, lost_mj, told):
    """Above 1 % of the total, and only where there are phases that could have held it."""
    for start_s, first_mj in ((0, 0), (13, 1_000_000 + lost_mj)):
        scribe = Scribe(path, start_s)
        scribe.read(start_s, first_mj)
        scribe.mark(start_s + 10, forward_backward=10.0)
        scribe.read(start_s + 10, first_mj + 1_000_000)
        scribe.close()
    note = "13.0% of the energy is unattributed: phases, components and the energy of a step do not hold it"
    assert [line for line in fold_ledgers([path]).notes if "unattributed" in line] == [note] * told


def test_a_program_that_tells_no_phases_lacks_none(path):
    """All of its energy is unattributed, which is no news."""
    scribe = Scribe(path, 0)
    scribe.read(0, 0)
    scribe.read(10, 1_000_000)
    scribe.end(10)
    fold = fold_ledgers([path])
    assert fold.total.unattributed_j == 1000
    assert fold.notes == []
