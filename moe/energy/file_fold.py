"""One ledger file, folded record by record: its segments, and what was lost between them."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from moe.energy.ledger import MEND, Record, read_ledger
from moe.energy.sources.base import COUNTERS
from moe.energy.timeline import Segment
from moe.errors import LedgerError

__all__ = ["NS_PER_HOUR", "FileFold", "Lost", "device_hours_of"]

NS_PER_HOUR = 3_600_000_000_000


@dataclass(frozen=True)
class Lost:
    """Energy of a killed segment after its last reading: at an even rate, up to one flush interval."""

    uuid: str
    position: int  # of the killed segment in its file
    start_ns: int
    end_ns: int
    utc_offset_ns: int
    energy_mj: int

    def upto(self, at_ns: int) -> int:
        """Millijoules of it up to a moment between its ends."""
        return self.energy_mj * (at_ns - self.start_ns) // (self.end_ns - self.start_ns)


@dataclass
class FileFold:
    """One ledger file, fed record by record."""

    path: Path | None
    segments: list[Segment] = field(default_factory=list)
    torn_bytes: int = 0
    _read_before: list[dict[str, int]] = field(default_factory=list, init=False, repr=False, compare=False)

    def feed(self, record: Record) -> None:
        """Take the next record in."""
        if record["kind"] != "segment" and not self.segments:
            raise LedgerError(f"ledger {self.path} does not begin with a segment line: {MEND}")
        try:
            if record["kind"] == "segment":
                self._begin(Segment(record))
            else:
                self.segments[-1].feed(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LedgerError(
                f"ledger {self.path}: the {record['kind']} line with seq {record['seq']} is not as this program writes "
                f"it ({type(error).__name__} {error}): {MEND}"
            ) from None

    def _begin(self, segment: Segment) -> None:
        """Go on with the next segment. Those before it are whole: which of them last read a device stays as it is."""
        last_read: dict[str, int] = {}  # a segment killed before its first reading of a device has none
        if self.segments:
            lines = self.segments[-1].lines.items()
            last_read = self._read_before[-1] | {u: len(self.segments) - 1 for u, line in lines if line.times_ns}
        self._read_before.append(last_read)
        self.segments.append(segment)

    @classmethod
    def read(cls, path: Path) -> "FileFold":
        """The fold of a whole ledger. Raises LedgerError when it is damaged."""
        file = cls(path)
        for record in read_ledger(path, on_torn=file.note_torn):
            file.feed(record)
        return file

    def note_torn(self, size: int) -> None:
        """Remember that the ledger ended in `size` bytes of an unfinished line."""
        self.torn_bytes = size

    def lost(self, position: int) -> list[Lost]:
        """What killed segments used after their last readings, as this segment's first readings tell it."""
        after = self.segments[position]
        found = []
        for uuid, line in after.lines.items():
            killed = self._read_before[position].get(uuid)
            if killed is None:
                continue
            before = self.segments[killed]
            if before.end_reason is not None or not _same_counter(uuid, before, after):
                continue
            old = before.lines[uuid].track
            if old.last_raw_mj is None or line.first_raw_mj is None:
                continue
            length_ns, limit_ns = line.times_ns[0] - old.last_ns, round(before.header["flush_s"] * 1e9)
            energy_mj = line.first_raw_mj - old.last_raw_mj
            if length_ns > limit_ns:
                length_ns, energy_mj = limit_ns, energy_mj * limit_ns // length_ns
            if energy_mj > 0:
                end_ns = old.last_ns + length_ns
                found.append(Lost(uuid, killed, old.last_ns, end_ns, before.utc_offset_ns, energy_mj))
        return found

    def unattributed_mj(self, position: int) -> dict[str, int]:
        """Millijoules of `lost`, per device."""
        return {lost.uuid: lost.energy_mj for lost in self.lost(position)}

    def lineage_ends(self) -> list[int | None]:
        """Of each segment the last step that survives: its own last one, unless a later segment resumed before it.

        None for a segment that never told a step.
        """
        ends: list[int | None] = []
        resumed = sys.maxsize  # the earliest step that a later segment resumed from
        for segment in reversed(self.segments):
            ends.append(None if segment.last_step is None else min(segment.last_step, resumed))
            resumed = min(resumed, segment.header["resumed_step"])
        return ends[::-1]

    def spent_before(self, position: int, boottime_ns: int) -> tuple[float, float]:
        """(millijoules, device-nanoseconds) up to a moment of the segment at `position`, on that segment's clock."""
        energy_mj, device_ns = self.segments[position].spent_at(boottime_ns)
        for earlier in self.segments[:position]:
            energy_mj += earlier.energy_mj
            device_ns += len(earlier.lines) * earlier.elapsed_ns
        return energy_mj + sum(sum(self.unattributed_mj(p).values()) for p in range(position + 1)), device_ns

    @property
    def energy_mj(self) -> int:
        lost = (sum(self.unattributed_mj(i).values()) for i in range(len(self.segments)))
        return sum(segment.energy_mj for segment in self.segments) + sum(lost)

    @property
    def has_reading(self) -> bool:
        return any(line.times_ns for segment in self.segments for line in segment.lines.values())


def _same_counter(uuid: str, before: Segment, after: Segment) -> bool:
    """Whether a device's readings in two segments are of one counter, which may have gone on in between."""
    boots = {segment.header["boot_id"] for segment in (before, after)}
    sources = {segment.lines[uuid].device["source"] for segment in (before, after)}
    return len(boots) == len(sources) == 1 and "" not in boots and sources <= set(COUNTERS)


def device_hours_of(segment: Segment) -> float:
    """Devices x time of one segment."""
    return len(segment.lines) * segment.elapsed_ns / NS_PER_HOUR
