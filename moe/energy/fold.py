"""Folds the ledgers of one run into totals: in integers, so that devices and phases sum to the total exactly.

What the numbers mean
    energy         joules between the first and last valid reading of each segment, plus `unattributed`
    unattributed   joules lost with a killed process: its counter went on, in the same boot, until the next segment read
                   it. At most one flush interval is billed; a longer gap is shared by time, for nobody knows more. Also
                   what no mark gives to a phase
    device_hours   devices x time from the start of the process to the last ledger line, summed over segments
    useful         time (energy) of steps that survive in the final lineage: what a later segment redid is not useful.
                   None when the run never told its steps
    coverage       share of that time lying between two valid reads
    band           sensor gain x energy, plus two ticks of full power per device and segment, plus three standard
                   errors of what a power sensor did not see
    per step       apportioned, like phases: energy between two readings is shared out by time
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.energy.conditions import check_power, summarize
from moe.energy.file_fold import NS_PER_HOUR, FileFold
from moe.energy.fold_notes import run_notes, sensor_notes
from moe.energy.sources.base import is_measured
from moe.energy.timeline import UNATTRIBUTED, DeviceLine, Segment
from moe.energy.totals import DeviceTotal, PhaseTotal, SegmentSummary, StepEnergy, Total
from moe.errors import LedgerError

__all__ = ["Fold", "fold_ledgers"]


@dataclass(frozen=True)
class Fold:
    """A run's ledgers, folded. `notes` are sentences a reader of the numbers should see."""

    files: list[FileFold]
    total: Total
    devices: list[DeviceTotal]
    phases: dict[str, PhaseTotal]
    segments: list[SegmentSummary]
    notes: list[str]

    @property
    def tokens(self) -> int | None:
        """Tokens of the final lineage, as the first ledger tells them; None when it never did."""
        return next((file.segments[-1].tokens or None for file in self.files if file.segments), None)

    @property
    def per_step(self) -> StepEnergy | None:
        """What a step that survives took in the mean, all nodes together; None when the run told no step."""
        first = self.files[0]
        ends = [end for end in first.lineage_ends() if end is not None]
        num_steps = ends[-1] - first.segments[0].header["resumed_step"] if ends else 0
        if num_steps <= 0 or self.total.useful_energy_j is None:
            return None
        return StepEnergy(energy_j=self.total.useful_energy_j / num_steps, num_steps=num_steps)

    @property
    def devices_at_once(self) -> int:
        """The most devices the run held at one moment, all nodes together: those its device-hours count."""
        spans = [
            [(s.start_ns + s.utc_offset_ns, s.last_ns + s.utc_offset_ns, len(s.lines)) for s in file.segments]
            for file in self.files
        ]
        # segments of one file follow one another, whatever a stepped clock says: the larger counts, not both
        return max(
            sum(max((held for start, end, held in file if start <= moment <= end), default=0) for file in spans)
            for moments in spans
            for moment, _, _ in moments
        )

    def at(self, segment: int, boottime_ns: int) -> tuple[float | None, float]:
        """(joules, device-hours) of the whole run up to a moment of a segment, both as the first ledger counts them.

        Interpolated between readings; joules are None when the run read no sensor at all. Of the other nodes' ledgers
        counts what they spent up to the same UTC moment, whatever segment they were in: a node may have joined late.
        Raises LedgerError for a segment the first ledger does not have.
        """
        first, *others = self.files
        part = next((part for part in first.segments if part.index == segment), None)
        if part is None:
            raise LedgerError(f"ledger {first.path} has no segment {segment}: give the ledger that belongs to this run")
        spent = [first.spent_before(first.segments.index(part), boottime_ns)]
        moment_utc_ns = boottime_ns + part.utc_offset_ns
        for file in others:
            begun = [p for p, part in enumerate(file.segments) if part.start_ns + part.utc_offset_ns <= moment_utc_ns]
            if begun:
                spent.append(file.spent_before(begun[-1], moment_utc_ns - file.segments[begun[-1]].utc_offset_ns))
        energy_mj, device_ns = map(sum, zip(*spent, strict=True))
        return None if self.total.energy_j is None else energy_mj / 1000, device_ns / NS_PER_HOUR

    def to_json(self, footprint: dict[str, Any] | None = None) -> dict[str, Any]:
        """The run as `moe energy report --json` prints it; `footprint` is that of `moe.energy.footprint`."""
        return {
            "total": vars(self.total),
            "devices": [vars(device) for device in self.devices],
            "phases": {
                name: {"energy_j": phase.energy_j, "elapsed_s": phase.elapsed_s} for name, phase in self.phases.items()
            },
            "per_step": None if self.per_step is None else vars(self.per_step),
            "footprint": footprint or {},
            "segments": [vars(segment) for segment in self.segments],
        }


def fold_ledgers(paths: Sequence[Path | str]) -> Fold:
    """Fold the ledgers of one run, one per node, the first node's first. Raises LedgerError when one is damaged."""
    files = []
    for path in map(Path, paths):
        files.append(FileFold.read(path))
    if not any(file.segments for file in files):
        raise LedgerError(f"ledger {', '.join(map(str, paths))} is empty: the run stopped before its first line")
    return _fold(files)


def _fold(files: list[FileFold]) -> Fold:
    phases, useful_mj, useful_ns = _phases(files)
    devices = _devices(files)
    summaries = [_summary(file, position) for file in files for position in range(len(file.segments))]
    energy_mj = sum(file.energy_mj for file in files)
    segments = [segment for file in files for segment in file.segments]
    by_source = {device.source: 0.0 for device in devices}
    for device in devices:
        by_source[device.source] += device.energy_j
    lost_mj = 0
    for file in files:
        for position, segment in enumerate(file.segments):
            for uuid, part_mj in file.unattributed_mj(position).items():
                lost_mj += part_mj
                by_source[segment.lines[uuid].device["source"]] += part_mj / 1000
    covered_ns = sum(line.track.covered_ns for segment in segments for line in segment.lines.values())
    device_ns = sum(len(segment.lines) * segment.elapsed_ns for segment in segments)
    total = Total(
        energy_j=energy_mj / 1000 if any(file.has_reading for file in files) else None,
        energy_mj=energy_mj,
        device_hours=device_ns / NS_PER_HOUR,
        useful_device_hours=None if useful_ns is None else useful_ns / NS_PER_HOUR,
        useful_energy_j=None if useful_ns is None else useful_mj / 1000,
        band_j=sum(device.band_j for device in devices) + lost_mj / 1000,
        coverage=min(1.0, covered_ns / device_ns) if device_ns else 0.0,
        unattributed_j=phases[UNATTRIBUTED].energy_j,
        scope="+".join(sorted({device.scope for device in devices})),
        source="+".join(sorted(by_source)),
        measured=all(is_measured(source) for source in by_source),
        energy_by_source_j=by_source,
    )
    return Fold(
        files, total, devices, phases, summaries, run_notes(files, total, phases) + sensor_notes(files, devices)
    )


def _phases(files: list[FileFold]) -> tuple[dict[str, PhaseTotal], float, float | None]:
    """Phase totals, useful millijoules, and useful device-nanoseconds (None when no step was ever told)."""
    energies: dict[str, int] = {}
    elapsed_ns: dict[str, int] = {}
    useful_mj, useful_ns, told = 0.0, 0.0, False
    for file in files:
        for position, (segment, end) in enumerate(zip(file.segments, file.lineage_ends(), strict=True)):
            told = told or end is not None
            parts, segment_useful_mj = segment.phase_energies(end or 0)
            if end is not None:
                useful_mj += segment_useful_mj
                useful_ns += segment.useful_ns(end) * len(segment.lines)
            for name, part_mj in parts.items():
                energies[name] = energies.get(name, 0) + part_mj
            for span in segment.spans:
                for name, spent_ns in span.phase_ns.items():
                    elapsed_ns[name] = elapsed_ns.get(name, 0) + spent_ns
            lost_mj = sum(file.unattributed_mj(position).values())
            energies[UNATTRIBUTED] = energies.get(UNATTRIBUTED, 0) + lost_mj
    names = [*elapsed_ns, *(name for name in energies if name not in elapsed_ns)]
    totals = {name: PhaseTotal(energies.get(name, 0), elapsed_ns.get(name, 0) / 1e9) for name in names}
    return totals, useful_mj, useful_ns if told else None


def _devices(files: list[FileFold]) -> list[DeviceTotal]:
    lines: dict[tuple[str, str], list[tuple[Segment, DeviceLine]]] = {}
    for file in files:
        for segment in file.segments:
            for uuid, line in segment.lines.items():
                lines.setdefault((uuid, line.device["source"]), []).append((segment, line))
    totals = []
    for (uuid, source), parts in lines.items():
        device = parts[-1][1].device
        wall_ns = sum(segment.elapsed_ns for segment, _ in parts)
        covered_ns = sum(line.track.covered_ns for _, line in parts)
        totals.append(
            DeviceTotal(
                uuid=uuid,
                name=device["name"],
                source=source,
                scope=device["scope"],
                energy_j=sum(line.energy_mj for _, line in parts) / 1000,
                band_j=sum(line.band_j() for _, line in parts),
                coverage=min(1.0, covered_ns / wall_ns) if wall_ns else 0.0,
                note=device["note"],
                conditions=_conditions([line for _, line in parts]),
            )
        )
    return totals


def _conditions(lines: list[DeviceLine]) -> dict[str, Any]:
    """What the device worked under, and how its power sensor stands to its counter."""
    summary = summarize([look for line in lines for look in line.looks])
    check = check_power([pair for line in lines for pair in line.power_pairs])
    return summary if check is None else {**summary, "power_over_counter": vars(check)}


def _summary(file: FileFold, position: int) -> SegmentSummary:
    segment = file.segments[position]
    header = segment.header
    return SegmentSummary(
        ledger=str(file.path),
        segment=segment.index,
        start_utc=header["utc"],
        host=header["host"],
        pid=header["pid"],
        devices=list(segment.lines),
        first_step=header["resumed_step"],
        last_step=segment.last_step,
        elapsed_s=segment.elapsed_ns / 1e9,
        energy_j=segment.energy_mj / 1000,
        unattributed_j=sum(file.unattributed_mj(position).values()) / 1000,
        ended="lost" if segment.end_reason is None else "end",
        end_reason=segment.end_reason,
        metered_by=header.get("metered_by"),
        second_reader=header.get("second_reader", []),
    )
