"""Sentences that a reader of a run's totals should see."""

from collections.abc import Mapping, Sequence

from moe.energy.conditions import PowerCheck
from moe.energy.file_fold import FileFold
from moe.energy.sources.base import is_measured
from moe.energy.sources.integral import seen_of
from moe.energy.timeline import UNATTRIBUTED
from moe.energy.totals import DeviceTotal, PhaseTotal, Total

__all__ = ["run_notes", "sensor_notes"]

WORTH_A_NOTE = 0.01  # share of the total that belongs to no phase


def run_notes(files: Sequence[FileFold], total: Total, phases: Mapping[str, PhaseTotal]) -> list[str]:
    """What the total is made of, what it does not hold, and which segments others read or nobody knows the end of."""
    notes = []
    if not total.measured:
        notes.append("energy is time x declared power")
    if "+" in total.source:
        notes.append(f"the total joins sources: {total.source}")
    if "+" in total.scope:
        notes.append(f"the total joins scopes ({total.scope}): compare it with nothing")
    unattributed_mj = phases[UNATTRIBUTED].energy_mj
    if len(phases) > 1 and unattributed_mj > total.energy_mj * WORTH_A_NOTE:
        share = f"{unattributed_mj / total.energy_mj:.1%} of the energy is unattributed"
        notes.append(f"{share}: phases, components and the energy of a step do not hold it")
    begun = files[0].segments[0].header["resumed_step"] if files[0].segments else 0
    if begun:
        notes.append(f"the ledger begins at step {begun}: what the run cost before is not counted")
    for file in files:
        if file.torn_bytes:
            notes.append(f"{file.path}: {file.torn_bytes} bytes of a torn last line were left out")
        told = {
            p for later in range(len(file.segments)) for lost in file.lost(later) for p in range(lost.position, later)
        }
        for position, segment in enumerate(file.segments):
            followed = position + 1 < len(file.segments)
            if followed and segment.end_reason is None and position not in told and is_measured(total.source):
                notes.append(f"what segment {segment.index} used after its last reading is not known")
            if segment.header.get("second_reader"):
                devices = ", ".join(segment.header["second_reader"])
                notes.append(f"segment {segment.index}: another meter read {devices} at the same time")
    return notes


def sensor_notes(files: Sequence[FileFold], devices: Sequence[DeviceTotal]) -> list[str]:
    """A sentence for each kind of failure of a device's sensor, with the last reason; and two that disagree."""
    gaps: dict[tuple[str, str], list[str]] = {}
    for file in files:
        for segment in file.segments:
            for uuid, line in segment.lines.items():
                for reason, detail in line.gaps:
                    gaps.setdefault((uuid, reason), []).append(detail)
    notes = _rare_reads(files)
    for (uuid, reason), details in gaps.items():
        detail = details[-1]
        times = "once" if len(details) == 1 else f"{len(details)} times"
        if reason == "lost":
            notes.append(f"{uuid}: reads failed {times}: {detail}")
        else:
            notes.append(f"{uuid}: {detail}, {times}: what it used across that is not known")
    for device in devices:
        check = device.conditions.get("power_over_counter")
        if check is not None and PowerCheck(**check).disagrees:
            notes.append(
                f"{device.uuid}: its power sensor tells {check['ratio'] - 1:+.1%} against its counter, over "
                f"{check['num_pairs']} seconds read by both: one of them is wrong"
            )
    return notes


def _rare_reads(files: Sequence[FileFold]) -> list[str]:
    """A sentence for each device whose power was read too rarely to see what a read a second sees."""
    intervals: dict[str, list[int]] = {}  # how many there are, and how many nanoseconds
    for file in files:
        for segment in file.segments:
            for uuid, line in segment.lines.items():
                if line.device["source"] == "integrated" and line.times_ns:
                    known = intervals.setdefault(uuid, [0, 0])
                    known[0] += len(line.times_ns) - 1
                    known[1] += line.track.covered_ns
    means_s = {uuid: covered_ns / num / 1e9 for uuid, (num, covered_ns) in intervals.items() if num}
    return [
        f"{uuid}: its power was read every {mean_s:.1f} s, being dear or slow to read; the band holds what that missed"
        for uuid, mean_s in means_s.items()
        if seen_of(mean_s, seen=1.0) < 1.0
    ]
