"""Prefetching: the next read runs while the last is used, and neither results nor errors depend on it."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from moe.data import Prefetch


@pytest.fixture
def prefetching() -> Iterator[Callable[[Callable[[int], int]], Prefetch[int]]]:
    """Makes prefetchers and closes them."""
    made: list[Prefetch[int]] = []

    def make(read: Callable[[int], int]) -> Prefetch[int]:
        made.append(Prefetch(read))
        return made[-1]

    yield make
    for prefetch in made:
        prefetch.close()


def test_the_next_is_read_while_the_last_is_used(prefetching: Callable) -> None:
    """After the first, a reader no slower than its user costs no waiting; one read is ahead, never two."""
    reads: list[int] = []

    def read(number: int) -> int:
        reads.append(number)
        time.sleep(0.05)
        return number * 10

    prefetch = prefetching(read)
    assert prefetch.take(0) == 0
    first = prefetch.wait_s
    assert first >= 0.05
    for number in (1, 2, 3):
        time.sleep(0.1)
        assert reads == list(range(number + 1))
        assert prefetch.take(number) == number * 10
    assert prefetch.wait_s - first < 0.05


def test_another_number_is_just_read(prefetching: Callable) -> None:
    """After a rollback what was read ahead is forgotten; reads never overlap, whatever is asked for."""
    inside = threading.Lock()

    def read(number: int) -> int:
        assert inside.acquire(blocking=False), "two reads at once"
        time.sleep(0.01)
        inside.release()
        return number

    prefetch = prefetching(read)
    for number in (5, 6, 2, 3, 3, 100, 101, 0):
        assert prefetch.take(number) == number


def test_an_error_comes_out_where_it_is_taken(prefetching: Callable) -> None:
    """As itself, once its number is asked for and not before; the number can then be read again."""
    failing = {2}

    def read(number: int) -> int:
        if number in failing:
            raise KeyError(number)
        return number

    prefetch = prefetching(read)
    assert [prefetch.take(number) for number in (0, 1)] == [0, 1]
    with pytest.raises(KeyError):
        prefetch.take(2)
    failing.clear()
    assert prefetch.take(2) == 2


def test_a_reader_that_only_goes_forwards_can_be_set_back(prefetching: Callable) -> None:
    """`discard` ends the read ahead before the reader's place is restored, so that nothing is lost or seen twice."""
    place = 0

    def read(_: int) -> int:
        nonlocal place
        time.sleep(0.01)
        place += 1
        return place

    prefetch = prefetching(read)
    assert [prefetch.take(number) for number in (0, 1, 2)] == [1, 2, 3]
    prefetch.discard()
    place = 1
    assert [prefetch.take(number) for number in (1, 2)] == [2, 3]


def test_closing_ends_the_thread() -> None:
    """No thread is left, though a read was under way."""
    prefetch = Prefetch(lambda number: time.sleep(0.05) or number)
    assert prefetch.take(0) == 0
    prefetch.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
