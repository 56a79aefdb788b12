"""When a run used its energy: joins the readings of all its ledgers with the clock that grids and prices go by."""

from dataclasses import dataclass
from typing import NamedTuple

from moe.energy.fold import Fold
from moe.energy.timeline import DeviceLine

__all__ = ["EnergyProfile"]


class _Line(NamedTuple):
    line: DeviceLine
    utc_offset_ns: int


@dataclass(frozen=True)
class _Lost:
    """Energy of a killed segment after its last reading: at an even rate, up to one flush interval."""

    start_ns: int
    end_ns: int
    energy_mj: int

    def before(self, utc_ns: int) -> float:
        return self.energy_mj * min(1.0, max(0.0, (utc_ns - self.start_ns) / (self.end_ns - self.start_ns)))


class EnergyProfile:
    """Cumulative energy of a folded run over UTC nanoseconds; between two readings it grows evenly.

    `start_ns` and `end_ns` are the first and last reading. Splitting a ledger into segments changes nothing.
    """

    def __init__(self, fold: Fold) -> None:
        self._lines: list[_Line] = []
        self._lost: list[_Lost] = []
        for file in fold.files:
            for position, segment in enumerate(file.segments):
                self._lines += [_Line(line, segment.utc_offset_ns) for line in segment.lines.values() if line.times_ns]
                for uuid, lost_mj in file.unattributed_mj(position).items():
                    before = file.segments[position - 1]
                    start_ns = before.lines[uuid].track.last_ns
                    gap_ns = segment.lines[uuid].times_ns[0] - start_ns
                    end_ns = start_ns + min(gap_ns, round(before.header["flush_s"] * 1e9))
                    self._lost.append(_Lost(start_ns + before.utc_offset_ns, end_ns + before.utc_offset_ns, lost_mj))
        self.start_ns = min((line.times_ns[0] + offset for line, offset in self._lines), default=0)
        self.end_ns = max((line.times_ns[-1] + offset for line, offset in self._lines), default=0)

    def before(self, utc_ns: int) -> float:
        """Millijoules used up to a moment."""
        read_mj = sum(line.energy_at(utc_ns - offset_ns) for line, offset_ns in self._lines)
        return read_mj + sum(lost.before(utc_ns) for lost in self._lost)

    def between(self, start_ns: int, end_ns: int) -> float:
        """Millijoules used from one moment to another."""
        return self.before(end_ns) - self.before(start_ns)
