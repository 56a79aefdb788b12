"""What a whole programme of runs cost: sweeps, failed runs, restarts, branches, metered programs; nothing twice.

The same segment in several ledgers (a copied folder, a branch of a trunk) is told by boot, host, process and start; its
longest version counts. Then each device of each boot has its energy and time counted once for each moment, however many
meters read it: measurements before estimates, outer meters before what ran inside them. Measured energy and estimates
are two totals, never added.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.energy.claims import Claim, count_once, hand_down
from moe.energy.file_fold import NS_PER_HOUR, FileFold
from moe.energy.spending import Programme, RunShare, Spent, half_of
from moe.energy.timeline import DeviceLine, Segment
from moe.errors import LedgerError

__all__ = ["RunLedgers", "fold_programme"]


@dataclass(frozen=True)
class RunLedgers:
    """The ledgers of one run, by the name to call it; `trunk` is the name of the run it was branched from."""

    name: str
    ledgers: tuple[Path, ...]
    trunk: str | None = None


@dataclass(frozen=True)
class _Copy:
    """A segment as one ledger has it; `last_step` is the last of its steps that survives there."""

    run: int
    file: FileFold
    position: int
    last_step: int | None

    @property
    def segment(self) -> Segment:
        return self.file.segments[self.position]


def _identity(segment: Segment) -> tuple[Any, ...]:
    """What a segment is known by, whatever ledger it is found in."""
    return tuple(segment.header[name] for name in ("boot_id", "host", "pid", "boottime_ns", "utc"))


def fold_programme(runs: Sequence[RunLedgers]) -> Programme:
    """Fold the ledgers of many runs into one programme; of those that cannot be read, only say so."""
    unreadable: list[str] = []
    copies: dict[tuple[Any, ...], list[_Copy]] = {}
    shares = []
    for number, run in enumerate(runs):
        ended = "no line"
        for path in run.ledgers:
            try:
                file = FileFold.read(path)
            except LedgerError as error:
                unreadable.append(str(error))
                ended = "unreadable"
                continue
            for position, last_step in enumerate(file.lineage_ends()):
                copy = _Copy(number, file, position, last_step)
                copies.setdefault(_identity(copy.segment), []).append(copy)
            if file.segments and path == run.ledgers[0]:
                ended = file.segments[-1].end_reason or "lost"
        shares.append(RunShare(run.name, ended))
    copies = dict(sorted(copies.items()))  # whatever the order they were given in, equal claims are heard alike
    kept = {identity: _longest(found, runs) for identity, found in copies.items()}
    recognised = list(_copied(copies, kept, runs))
    energies, times = _claims(copies, kept)
    for claims in (*energies.values(), *times.values()):
        claims.sort(key=lambda claim: (not claim.measured, claim.start_ns, -claim.end_ns))
        count_once(claims)
        hand_down(claims)
    recognised += _read_twice(energies, runs)
    used = [claim for claims in energies.values() for claim in claims]
    held = [claim for claims in times.values() for claim in claims]
    for claim in used:
        shares[claim.run].part(claim).energy_mj += claim.counted
    for claim in held:
        shares[claim.run].part(claim).device_ns += claim.counted
    measured, estimated = (
        half_of(
            [claim for claim in used if claim.measured == kind], [claim for claim in held if claim.measured == kind]
        )
        for kind in (True, False)
    )
    return Programme(measured, estimated, shares, recognised, unreadable)


def _longest(found: Sequence[_Copy], runs: Sequence[RunLedgers]) -> _Copy:
    """The version that goes furthest; of equal ones a trunk's before its branches', then the first."""

    def reach(copy: _Copy) -> tuple[int, int, bool, bool]:
        segment = copy.segment
        return segment.last_ns, len(segment.spans), runs[copy.run].trunk is None, segment.end_reason is not None

    return max(found, key=reach)


def _copied(
    copies: dict[tuple[Any, ...], list[_Copy]], kept: dict[tuple[Any, ...], _Copy], runs: Sequence[RunLedgers]
) -> Iterable[str]:
    shared: dict[tuple[int, int], Spent] = {}
    for identity, found in copies.items():
        for copy in found:
            if copy is not kept[identity]:
                spent = shared.setdefault((copy.run, kept[identity].run), Spent())
                spent.energy_mj += copy.segment.energy_mj
                spent.device_ns += len(copy.segment.lines) * copy.segment.elapsed_ns
    for (run, of), spent in shared.items():
        mine, other = runs[run], runs[of]
        if mine.trunk is not None and mine.trunk == other.trunk:
            what = f"{mine.name} and {other.name} are branches of {mine.trunk}"
        elif mine.trunk is not None and mine.trunk == Path(other.name).name:
            what = f"{mine.name} is a branch of {other.name}"
        else:
            what = f"{mine.name} holds segments of {other.name} too"
        yield f"{what}: the {_spent(spent)} they share are counted once"


def _read_twice(energies: dict[Any, list[Claim]], runs: Sequence[RunLedgers]) -> Iterable[str]:
    """Sentences on energy that several meters read at the same time."""
    shared: dict[tuple[int, int, bool], int] = {}
    for claims in energies.values():
        for claim in claims:
            rest = claim.whole - claim.given
            if rest <= 0 or not claim.purposes:
                continue
            others = (
                other
                for other in claims
                if other is not claim and any(s < claim.end_ns and claim.start_ns < e for s, e in other.pieces)
            )
            of = next((other.run for other in others), claim.run)
            key = (claim.run, of, claim.nested)
            shared[key] = shared.get(key, 0) + rest
    for (run, of, nested), energy_mj in shared.items():
        how = "was metered from outside by" if nested else "read a device at the same time as"
        yield f"{runs[run].name} {how} {runs[of].name}: its {energy_mj / 1000:,.3f} J are not counted again"


def _spent(spent: Spent) -> str:
    return f"{spent.energy_mj / 1000:,.3f} J and {spent.device_ns / NS_PER_HOUR:.6g} device-hours"


def _claims(
    copies: dict[tuple[Any, ...], list[_Copy]], kept: dict[tuple[Any, ...], _Copy]
) -> tuple[dict[Any, list[Claim]], dict[Any, list[Claim]]]:
    """Claims on energy and on time, by device of a boot."""
    energies: dict[Any, list[Claim]] = {}
    times: dict[Any, list[Claim]] = {}
    for identity, copy in kept.items():
        segment = copy.segment
        ends = (each.last_step for each in copies[identity] if not _is_outdated(each.file, copies))
        last_step = max((end for end in ends if end is not None), default=0)  # it may survive in any of the lineages
        boot = segment.header["boot_id"] or identity
        for uuid, line in segment.lines.items():
            energy_purposes, time_purposes = segment.purposes(uuid, last_step)
            if line.times_ns:
                first_ns, last_ns = line.times_ns[0], line.times_ns[-1]
                claim = _claim(copy, line, first_ns, last_ns, line.whole_mj_at, energy_purposes)
                energies.setdefault((boot, uuid), []).append(claim)
            # time up to a moment is the moment itself
            held = _claim(copy, line, segment.start_ns, segment.last_ns, int, time_purposes)
            times.setdefault((boot, uuid), []).append(held)
    for identity, found in copies.items():
        for copy in found:
            for lost in copy.file.lost(copy.position):
                before = copy.file.segments[lost.position]
                # where a copy goes less far than the version that counts, that one knows what came after
                if before.last_ns == kept[_identity(before)].segment.last_ns:
                    line = before.lines[lost.uuid]
                    claim = _claim(kept[identity], line, lost.start_ns, lost.end_ns, lost.upto, {})
                    energies[before.header["boot_id"], lost.uuid].append(claim)
    return energies, times


def _is_outdated(file: FileFold, copies: dict[tuple[Any, ...], list[_Copy]]) -> bool:
    """Whether another ledger goes on from where this one stops: it is no lineage of its own, but an older copy."""
    last = file.segments[-1]
    return any(
        (other.segment.last_ns, other.position + 1 < len(other.file.segments)) > (last.last_ns, False)
        for other in copies[_identity(last)]
    )


def _claim(
    copy: _Copy,
    line: DeviceLine,
    start_ns: int,
    end_ns: int,
    upto: Callable[[int], int],
    purposes: dict[str, int],
) -> Claim:
    return Claim(
        run=copy.run,
        line=line,
        start_ns=start_ns,
        end_ns=end_ns,
        utc_offset_ns=copy.segment.utc_offset_ns,
        upto=upto,
        purposes=purposes,
        nested="metered_by" in copy.segment.header,
    )
