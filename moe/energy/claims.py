"""Claims on one device, of which each moment counts once: copies, branches, nested meters and second readers alike.

A device of one boot has one clock and one energy. Whoever says what it used between two moments makes a claim. Claims
are heard in order, and each is given what lies outside the claims before it:

    outer meter  |-----------------------|      10 J, given all of them
    its child         |-----------|              6 J, given none: they are among the 10. Then they are handed down to
                                                it, for it knows their purpose: the outer meter keeps 4
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from moe.energy.sources.base import is_measured
from moe.energy.timeline import UNATTRIBUTED, DeviceLine, apportion

__all__ = ["Claim", "count_once", "hand_down"]

_NS_PER_DAY = 86_400 * 10**9


@dataclass(eq=False)
class Claim:
    """A quantity (millijoules, or nanoseconds held) that one segment says a device used from `start_ns` to `end_ns`.

    upto      the quantity up to a moment, as an integer: parts of it sum to the whole
    purposes  the whole by purpose; empty where the segment was killed, and a later one told what it had used
    nested    the segment was metered from outside, too
    pieces    the intervals it was given; `given` their sum, `counted` what of it stayed after handing down
    """

    run: int
    line: DeviceLine
    start_ns: int
    end_ns: int
    utc_offset_ns: int
    upto: Callable[[int], int]
    purposes: dict[str, int]
    nested: bool = False
    pieces: list[tuple[int, int]] = field(default_factory=list)
    given: int = 0
    counted: int = 0

    @property
    def source(self) -> str:
        return str(self.line.device["source"])

    @property
    def measured(self) -> bool:
        return is_measured(self.source)

    @property
    def length_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def whole(self) -> int:
        return self.upto(self.end_ns) - self.upto(self.start_ns)

    def by_purpose(self) -> dict[str, int]:
        """What is counted of it, by purpose."""
        return apportion(self.counted, self.purposes) if self.purposes else {UNATTRIBUTED: self.counted}

    def by_day(self) -> Iterator[tuple[str, int]]:
        """(UTC day, what was given of it on that day)."""
        for start_ns, end_ns in self.pieces:
            while start_ns < end_ns:
                utc_ns = start_ns + self.utc_offset_ns
                until_ns = min(end_ns, start_ns + _NS_PER_DAY - utc_ns % _NS_PER_DAY)
                day = datetime.fromtimestamp(utc_ns // 10**9, UTC).date().isoformat()
                yield day, self.upto(until_ns) - self.upto(start_ns)
                start_ns = until_ns


def count_once(claims: Sequence[Claim]) -> None:
    """Give each claim, in the order they come, what no claim before it was given."""
    taken: list[tuple[int, int]] = []
    for claim in claims:
        claim.pieces = list(_outside(claim.start_ns, claim.end_ns, taken))
        claim.given = claim.counted = sum(claim.upto(end) - claim.upto(start) for start, end in claim.pieces)
        taken = sorted([*taken, *claim.pieces])


def hand_down(claims: Sequence[Claim]) -> None:
    """Move to each nested claim what the claims around it were given of the same moments."""
    by_length = sorted(claims, key=lambda claim: claim.length_ns)
    for inner in reversed([claim for claim in by_length if claim.nested]):
        for outer in by_length:
            around = outer.start_ns <= inner.start_ns and inner.end_ns <= outer.end_ns
            if outer is not inner and around and outer.measured == inner.measured:
                same = outer.source == inner.source  # of other sensors counts what the outer one saw in that time
                seen = inner.whole if same else outer.upto(inner.end_ns) - outer.upto(inner.start_ns)
                moved = max(0, min(seen - inner.counted, outer.counted))
                inner.counted += moved
                outer.counted -= moved


def _outside(start_ns: int, end_ns: int, taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for taken_start, taken_end in taken:
        if taken_end <= start_ns:
            continue
        if taken_start >= end_ns:
            break
        if taken_start > start_ns:
            yield start_ns, taken_start
        start_ns = max(start_ns, taken_end)
    if start_ns < end_ns:
        yield start_ns, end_ns
