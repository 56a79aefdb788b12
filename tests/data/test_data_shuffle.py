"""The shuffled stream: every document once an epoch, in an order of its own, with no more held than was allowed."""

import json
from pathlib import Path

import pytest

from moe.config import DataConfig
from moe.data.shuffle import ShuffledDocuments
from moe.data.sources import DocumentStream, open_source
from moe.errors import ConfigError

from .conftest import write_jsonl

COUNT, SIZE = 46, 8  # the last block of an epoch is shorter, for one rank and for two


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A row for validation, then COUNT documents that are their own numbers."""
    return write_jsonl(tmp_path / "rows.jsonl", ["held out", *map(str, range(COUNT))])


def stream(file: Path, rank: int = 0, ranks: int = 1) -> DocumentStream:
    return open_source(str(file), DataConfig(source=str(file), validation_fraction=0.001)).stream(rank, ranks)


def epochs(documents: DocumentStream, count: int, at_once: int = 3) -> list[list[int]]:
    """Numbers of the next documents by the epoch `documents` says they are of."""
    found: list[list[int]] = [[] for _ in range(count)]
    while documents.epoch < count:
        epoch = documents.epoch
        found[epoch] += map(int, documents.read(at_once))
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_an_epoch_is_every_document_once(file: Path, rank: int) -> None:
    """In blocks of the source's order, each in another order than it had, and than it has in the next epoch."""
    one, two = epochs(ShuffledDocuments(stream(file, rank, 2), SIZE, seed=1), 2)
    share = list(range(rank, COUNT, 2))
    for order in (one, two):
        blocks = [order[start : start + SIZE] for start in range(0, len(share), SIZE)]
        assert [number for block in blocks for number in sorted(block)] == share
        assert all(block != sorted(block) for block in blocks)
    assert one != two


def test_the_order_follows_from_the_seed_alone(file: Path) -> None:
    """Not from how many documents are asked for at once."""
    orders = [epochs(ShuffledDocuments(stream(file), SIZE, seed=1), 2, at_once) for at_once in (1, 3, 8, 100)]
    assert orders[1:] == orders[:1] * 3
    assert epochs(ShuffledDocuments(stream(file), SIZE, seed=2), 2) != orders[0]


def test_it_goes_on_from_any_place(file: Path) -> None:
    """Within a block, at its ends and across epochs, from what JSON keeps: as the stream nobody stopped."""
    straight = ShuffledDocuments(stream(file), SIZE, seed=1)
    places, parts = [], []
    for _ in range(40):
        places.append(json.dumps(straight.state()))
        parts.append(straight.read(3))
    assert {json.loads(place)["used"] for place in places} == {0, 3, 6}
    assert straight.epoch == 2
    resumed = ShuffledDocuments(stream(file), SIZE, seed=1)
    for begin in (*range(40), 0):
        resumed.restore(json.loads(places[begin]))
        assert json.dumps(resumed.state()) == places[begin]
        assert [resumed.read(3) for _ in parts[begin : begin + 6]] == parts[begin : begin + 6]


def test_an_epoch_of_whole_blocks(file: Path) -> None:
    """Where the documents fill the last block its end is the epoch's; one block may hold all, and one document too."""
    for size in (COUNT // 2, COUNT, 10 * COUNT, 1):
        for order in epochs(ShuffledDocuments(stream(file), size, seed=1), 2):
            assert sorted(order) == list(range(COUNT))
            assert (order != sorted(order)) == (size > 1)


def test_no_more_is_read_than_may_be_held(file: Path) -> None:
    """What was read and not yet handed out never exceeds the buffer."""
    source = stream(file)
    shuffled = ShuffledDocuments(source, SIZE, seed=1)
    for handed_out in range(1, COUNT):
        assert len(shuffled.read(1)) == 1
        read = source.state()["documents"] + COUNT * source.epoch
        assert 0 <= read - handed_out < SIZE


def test_a_buffer_of_less_than_nothing_is_refused() -> None:
    """One sentence; 0 is the source's own order."""
    with pytest.raises(ConfigError, match=r"data\.shuffle_buffer=-1 must be at least 0"):
        DataConfig(streaming=True, shuffle_buffer=-1)
