"""One segment of one ledger: its readings and marks, and the energy of each phase between them."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from moe.energy.clock import parse_utc_ns
from moe.energy.conditions import pick_conditions
from moe.energy.ledger import Record
from moe.energy.phases import LOST, PURPOSE_OF, STEP_PHASES
from moe.energy.track import SIGMAS, DeviceTrack

__all__ = ["UNATTRIBUTED", "DeviceLine", "Segment", "apportion"]

UNATTRIBUTED = "unattributed"
NS_PER_S = 10**9
PAIR_NS = 3 * NS_PER_S // 2  # a second across which the counter was read less often is no pair


def apportion(total: int, weights: dict[str, int]) -> dict[str, int]:
    """Split an integer in proportion to weights, largest remainders first, so that the parts sum to it exactly.

    >>> apportion(10, {"a": 1, "b": 1, "c": 1})
    {'a': 4, 'b': 3, 'c': 3}
    """
    whole = sum(weights.values())
    if whole <= 0:
        return {UNATTRIBUTED: total}
    parts = {name: total * weight // whole for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: -(total * weights[name] % whole))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


@dataclass
class DeviceLine:
    """One device over one segment: cumulative millijoules at each valid reading."""

    device: dict[str, Any]
    track: DeviceTrack
    times_ns: "array[int]" = field(default_factory=lambda: array("q"))
    energies_mj: "array[int]" = field(default_factory=lambda: array("q"))
    first_raw_mj: int | None = None
    max_power_w: float = 0.0
    looks: list[dict[str, Any]] = field(default_factory=list)
    power_pairs: list[tuple[float, float]] = field(default_factory=list)
    gaps: list[tuple[str, str]] = field(default_factory=list)
    _whole_since_ns: int = 0

    def add(self, at_ns: int, raw_mj: int | None) -> None:
        """Take a reading, or a failed one (None), in."""
        before_ns, before_mj = self.track.last_ns, self.track.energy_mj
        event = self.track.update(at_ns, raw_mj)
        if event is not None or before_mj is None:
            self._whole_since_ns = at_ns
        if raw_mj is None or self.track.energy_mj is None:
            return
        if before_mj is None:
            self.first_raw_mj = raw_mj
        elif at_ns > before_ns:
            power_w = (self.track.energy_mj - before_mj) * 1e6 / (at_ns - before_ns)
            self.max_power_w = max(self.max_power_w, power_w)
        self.times_ns.append(at_ns)
        self.energies_mj.append(self.track.energy_mj)

    def look(self, at_ns: int, conditions: dict[str, Any]) -> None:
        """Take in what the device works under, told with the reading at this moment."""
        self.looks.append(conditions)
        if self.device["source"] != "counter" or "power_w" not in conditions:
            return
        second_ago_ns = at_ns - NS_PER_S  # what current power sensors average over
        before_ns = self.times_ns[-2] if len(self.times_ns) > 1 else 0
        if second_ago_ns >= self._whole_since_ns and at_ns - before_ns <= PAIR_NS:
            counter_w = (self.energy_at(at_ns) - self.energy_at(second_ago_ns)) / 1000
            self.power_pairs.append((conditions["power_w"], counter_w))

    @property
    def energy_mj(self) -> int:
        return self.track.energy_mj or 0

    def energy_at(self, at_ns: int) -> float:
        """Cumulative millijoules at a moment, linear between readings."""
        right = bisect_right(self.times_ns, at_ns)
        if right == 0:
            return 0.0
        if right == len(self.times_ns):
            return float(self.energy_mj)
        left_ns, right_ns = self.times_ns[right - 1], self.times_ns[right]
        left_mj, right_mj = self.energies_mj[right - 1], self.energies_mj[right]
        return left_mj + (right_mj - left_mj) * (at_ns - left_ns) / (right_ns - left_ns)

    def whole_mj_at(self, at_ns: int) -> int:
        """`energy_at` in whole millijoules, so that the parts of a stretch sum to it."""
        return round(self.energy_at(at_ns))

    def band_j(self) -> float:
        """Sensor gain on all of it, at most a tick of full power at each end, and what a power sensor did not see."""
        p_max_w = self.device["p_max_w"] or self.max_power_w
        quantum_j = 2 * self.device["tick_s"] * p_max_w if self.energy_mj else 0.0
        unseen_j = SIGMAS * sqrt(self.track.unseen_mj2) / 1000
        return self.energy_mj / 1000 * self.device["band"] + quantum_j + unseen_j


@dataclass(frozen=True)
class _Span:
    """What one mark says: the phases between the mark before and this one."""

    start_ns: int
    end_ns: int
    phase_ns: dict[str, int]
    step_before: int
    step: int

    def surviving(self, last_step: int) -> float:
        """Share of this span's step time that belongs to steps up to `last_step`, the end of the lineage."""
        if self.step <= self.step_before:  # inside one step: the one after `step`
            return 1.0 if self.step < last_step else 0.0
        return min(1.0, max(0.0, (last_step - self.step_before) / (self.step - self.step_before)))


class Segment:
    """One process's part of a run, built from its ledger records in order."""

    def __init__(self, header: Record) -> None:
        self.header = header
        self.index: int = header["segment"]
        self.start_ns: int = header["started_boottime_ns"]
        self.last_ns: int = header["boottime_ns"]
        self.utc_offset_ns = parse_utc_ns(header["utc"]) - header["boottime_ns"]
        self.end_reason: str | None = None
        self.lines = {d["uuid"]: DeviceLine(d, DeviceTrack(d["source"], d.get("seen", 1.0))) for d in header["devices"]}
        self.node_points: list[tuple[int, int]] = []  # boottime_ns, millijoules of the whole node's counter
        self.spans: list[_Span] = []
        self.tokens: int = header["resumed_tokens"]  # of the lineage, as far as the last mark that told them
        self._step: int = header["resumed_step"]
        self._told_step = False

    def feed(self, record: Record) -> None:
        """Take the next record of this segment in."""
        at_ns = record["boottime_ns"]
        self.last_ns = max(self.last_ns, at_ns)
        kind = record["kind"]
        if kind == "reading":
            self._feed_reading(record)
        elif kind == "gap" and record["device"] is not None:
            line = self.lines[record["device"]]
            line.gaps.append((record["reason"], record["detail"]))
            if record["reason"] == "lost":
                line.add(at_ns, None)
        elif kind == "mark":
            self._feed_mark(record)
        elif kind == "end":
            self.end_reason = record["reason"]

    def _feed_reading(self, record: Record) -> None:
        at_ns, line = record["boottime_ns"], self.lines[record["device"]]
        line.add(at_ns, record["energy_mj"])
        conditions = pick_conditions(record)
        if conditions:
            line.look(at_ns, conditions)
        if "node_energy_mj" in record:
            self.node_points.append((at_ns, record["node_energy_mj"]))

    def _feed_mark(self, record: Record) -> None:
        start_ns = self.spans[-1].end_ns if self.spans else self.start_ns
        phase_ns = {name: round(spent_s * 1e9) for name, spent_s in record["phase_s"].items()}
        before = self._step
        if record["step"] is not None:  # until the program tells a step, it works on the one after resumed_step
            self._step, self._told_step = record["step"], True
        if record["tokens"] is not None:
            self.tokens = record["tokens"]
        self.spans.append(_Span(start_ns, record["boottime_ns"], phase_ns, before, self._step))

    @property
    def last_step(self) -> int | None:
        """The last step this segment told of; None when it never told any."""
        return self._step if self._told_step else None

    @property
    def elapsed_ns(self) -> int:
        return self.last_ns - self.start_ns

    @property
    def energy_mj(self) -> int:
        return sum(line.energy_mj for line in self.lines.values())

    def spent_at(self, at_ns: int) -> tuple[float, float]:
        """(millijoules, device-nanoseconds) of this segment up to a moment of its clock, inside it or not."""
        at_ns = min(max(at_ns, self.start_ns), self.last_ns)
        energy_mj = sum(line.energy_at(at_ns) for line in self.lines.values())
        return energy_mj, len(self.lines) * (at_ns - self.start_ns)

    def useful_ns(self, last_step: int) -> float:
        """Time of surviving steps, for one device."""
        return sum(
            span.surviving(last_step) * sum(ns for name, ns in span.phase_ns.items() if name in STEP_PHASES)
            for span in self.spans
        )

    def phase_energies(self, last_step: int) -> tuple[dict[str, int], float]:
        """Millijoules per phase (they sum to `energy_mj`), and those of surviving steps.

        Each interval between two readings is shared out by the time its marks give to each phase.
        """
        energies: dict[str, int] = {}
        useful_mj = 0.0
        for line in self.lines.values():
            first_span = 0
            for i in range(1, len(line.times_ns)):
                delta_mj = line.energies_mj[i] - line.energies_mj[i - 1]
                start_ns, end_ns = line.times_ns[i - 1], line.times_ns[i]
                while first_span < len(self.spans) and self.spans[first_span].end_ns <= start_ns:
                    first_span += 1
                if delta_mj:
                    weights, useful_share = self._weights(first_span, start_ns, end_ns, last_step)
                    for name, part_mj in apportion(delta_mj, weights).items():
                        energies[name] = energies.get(name, 0) + part_mj
                    useful_mj += delta_mj * useful_share
        return energies, useful_mj

    def purposes(self, uuid: str, last_step: int) -> tuple[dict[str, int], dict[str, int]]:
        """(millijoules, nanoseconds) of one device by purpose: of all its readings, and of the whole segment."""
        line, energies, times = self.lines[uuid], dict[str, int](), dict[str, int]()
        for i in range(1, len(line.times_ns)):
            weights = dict[str, int]()
            first_span = bisect_right(self.spans, line.times_ns[i - 1], key=lambda span: span.end_ns)
            for name, weight, survives in self._parts(first_span, line.times_ns[i - 1], line.times_ns[i], last_step):
                _add(weights, name, weight, survives)
            for purpose, part_mj in apportion(line.energies_mj[i] - line.energies_mj[i - 1], weights).items():
                energies[purpose] = energies.get(purpose, 0) + part_mj
        for span in self.spans:
            for name, spent_ns in span.phase_ns.items():
                _add(times, name, spent_ns, span.surviving(last_step))
        return energies, apportion(self.elapsed_ns, times)

    def _weights(self, first_span: int, start_ns: int, end_ns: int, last_step: int) -> tuple[dict[str, int], float]:
        weights: dict[str, int] = {}
        useful = 0.0
        for name, weight, survives in self._parts(first_span, start_ns, end_ns, last_step):
            weights[name] = weights.get(name, 0) + weight
            if name in STEP_PHASES:
                useful += weight * survives
        whole = sum(weights.values())
        return weights, useful / whole if whole else 0.0

    def _parts(self, first_span: int, start_ns: int, end_ns: int, last_step: int) -> Iterator[tuple[str, int, float]]:
        """(phase, its nanoseconds between two moments, share of them that survives), from `first_span` on."""
        for position in range(first_span, len(self.spans)):  # no slice: it would copy the rest of the run each time
            span = self.spans[position]
            if span.start_ns >= end_ns:
                return
            length_ns = span.end_ns - span.start_ns
            overlap_ns = min(end_ns, span.end_ns) - max(start_ns, span.start_ns)
            survives = span.surviving(last_step)
            for name, spent_ns in span.phase_ns.items():
                yield name, spent_ns * overlap_ns // length_ns if length_ns else 0, survives


def _add(weights: dict[str, int], phase: str, weight: int, survives: float) -> None:
    """Add the time of a phase to its purposes: a step that a restart threw away has none but that."""
    kept = round(weight * survives) if phase in STEP_PHASES else weight
    purpose = PURPOSE_OF.get(phase, "other_programs")
    weights[purpose] = weights.get(purpose, 0) + kept
    if kept < weight:
        weights[LOST] = weights.get(LOST, 0) + weight - kept
