"""What a whole programme of runs cost: sweeps, failed runs, restarts, branches, metered programs; nothing twice.

The same segment in several ledgers (a copied folder, a branch of a trunk) is told by boot, host, process and start; its
longest version counts. Then each device of each boot has its energy and time counted once for each moment, however many
meters read it: measurements before estimates, outer meters before what ran inside them. Measured energy and estimates
are two totals, never added.

What for: `training` and `data` are steps that survive in some lineage, `lost_to_restarts` those that a restart did
again; `evaluation`, `checkpoints`, `startup_and_idle` (no phase named); `other_programs` (metered from outside, or
phases of their own); `unattributed`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.energy.claims import Claim, count_once, hand_down
from moe.energy.fold import NS_PER_HOUR, FileFold
from moe.energy.footprint.basis import Basis
from moe.energy.footprint.profile import EnergyProfile, Piece
from moe.energy.timeline import UNATTRIBUTED, DeviceLine, Segment
from moe.errors import LedgerError

__all__ = ["PURPOSES", "Half", "Programme", "RunLedgers", "fold_programme"]

PURPOSES = (
    "training", "data", "lost_to_restarts", "evaluation", "checkpoints", "startup_and_idle", "other_programs",
    UNATTRIBUTED,
)  # fmt: skip


@dataclass(frozen=True)
class RunLedgers:
    """The ledgers of one run, by the name to call it; `trunk` is the name of the run it was branched from."""

    name: str
    ledgers: tuple[Path, ...]
    trunk: str | None = None


@dataclass
class Spent:
    """Energy and device time."""

    energy_mj: int = 0
    device_ns: int = 0

    def to_json(self) -> dict[str, float]:
        return {"energy_j": self.energy_mj / 1000, "device_hours": self.device_ns / NS_PER_HOUR}


@dataclass
class Half:
    """One of the two totals: what was measured, or what was estimated. `energy_mj` is None when nothing was read."""

    basis: Basis
    by_scope: dict[str, int]
    by_purpose: dict[str, Spent]
    by_day: dict[str, Spent]

    @property
    def energy_mj(self) -> int | None:
        return self.basis.energy_mj

    def to_json(self) -> dict[str, Any]:
        """As `moe energy total --json` prints it, without the footprint."""
        basis = self.basis
        return {
            "energy_j": None if basis.energy_mj is None else basis.energy_mj / 1000,
            "band_j": basis.band_j,
            "device_hours": basis.device_hours,
            "coverage": basis.coverage,
            "source": basis.source,
            "scope": basis.scope,
            "energy_by_scope_j": {scope: energy_mj / 1000 for scope, energy_mj in self.by_scope.items()},
            "purposes": {name: self.by_purpose[name].to_json() for name in PURPOSES if name in self.by_purpose},
            "days": {day: self.by_day[day].to_json() for day in sorted(self.by_day)},
        }


@dataclass
class RunShare:
    """One run's part of the programme: what is counted for it, and how its last segment ended."""

    name: str
    ended: str
    measured: Spent = field(default_factory=Spent)
    estimated: Spent = field(default_factory=Spent)

    def to_json(self) -> dict[str, Any]:
        measured, estimated = self.measured.to_json(), self.estimated.to_json()
        return {"name": self.name, "ended": self.ended, "measured": measured, "estimated": estimated}


@dataclass
class Programme:
    """The totals; `recognised` says what was found twice and counted once, `unreadable` what is in no total."""

    measured: Half
    estimated: Half
    runs: list[RunShare]
    recognised: list[str]
    unreadable: list[str]

    @property
    def halves(self) -> dict[str, Half]:
        return {"measured": self.measured, "estimated": self.estimated}

    def to_json(self) -> dict[str, Any]:
        """As `moe energy total --json` prints it, without the footprints."""
        return {
            **{name: half.to_json() for name, half in self.halves.items()},
            "runs": [run.to_json() for run in self.runs],
            "recognised": self.recognised,
            "unreadable": self.unreadable,
        }


@dataclass(frozen=True)
class _Copy:
    """A segment as one ledger has it."""

    run: int
    file: FileFold
    position: int

    @property
    def segment(self) -> Segment:
        return self.file.segments[self.position]

    @property
    def identity(self) -> tuple[Any, ...]:
        header = self.segment.header
        return tuple(header[name] for name in ("boot_id", "host", "pid", "boottime_ns", "utc"))


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
            for position in range(len(file.segments)):
                copy = _Copy(number, file, position)
                copies.setdefault(copy.identity, []).append(copy)
            if file.segments and path == run.ledgers[0]:
                ended = file.segments[-1].end_reason or "lost"
        shares.append(RunShare(run.name, ended))
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
        share = shares[claim.run]
        (share.measured if claim.measured else share.estimated).energy_mj += claim.counted
    for claim in held:
        share = shares[claim.run]
        (share.measured if claim.measured else share.estimated).device_ns += claim.counted
    measured, estimated = (
        _half([claim for claim in used if claim.measured == kind], [claim for claim in held if claim.measured == kind])
        for kind in (True, False)
    )
    return Programme(measured, estimated, shares, recognised, unreadable)


def _longest(found: Sequence[_Copy], runs: Sequence[RunLedgers]) -> _Copy:
    """The version that goes furthest; of equal ones a trunk's before its branches', then the first."""
    return max(found, key=lambda copy: (copy.segment.last_ns, runs[copy.run].trunk is None))


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
        ends = (each.file.lineage_end(each.position) for each in copies[identity])
        last_step = max((end for end in ends if end is not None), default=0)  # it may survive in any of the lineages
        boot = segment.header["boot_id"] or identity
        for uuid, line in segment.lines.items():
            energy_purposes, time_purposes = segment.purposes(uuid, last_step)
            if line.times_ns:
                first_ns, last_ns = line.times_ns[0], line.times_ns[-1]
                claim = _claim(copy, line, first_ns, last_ns, line.whole_mj_at, energy_purposes)
                energies.setdefault((boot, uuid), []).append(claim)
            held = _claim(copy, line, segment.start_ns, segment.last_ns, int, time_purposes)
            times.setdefault((boot, uuid), []).append(held)
    for identity, found in copies.items():
        for copy in found:
            if not copy.position:
                continue
            earlier = _Copy(copy.run, copy.file, copy.position - 1)
            before = earlier.segment
            # where a copy goes less far than the version that counts, that one knows what came after
            if before.last_ns == kept[earlier.identity].segment.last_ns:
                for lost in copy.file.lost(copy.position):
                    line = before.lines[lost.uuid]
                    claim = _claim(kept[identity], line, lost.start_ns, lost.end_ns, lost.upto, {})
                    energies[before.header["boot_id"], lost.uuid].append(claim)
    return energies, times


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


def _half(used: Sequence[Claim], held: Sequence[Claim]) -> Half:
    by_scope, gpu_hours = dict[str, int](), dict[str, float]()
    by_purpose, by_day = dict[str, Spent](), dict[str, Spent]()
    for claim in used:
        scope = claim.line.device["scope"]
        by_scope[scope] = by_scope.get(scope, 0) + claim.given
        for purpose, energy_mj in claim.by_purpose().items():
            by_purpose.setdefault(purpose, Spent()).energy_mj += energy_mj
        for day, energy_mj in claim.by_day():
            by_day.setdefault(day, Spent()).energy_mj += energy_mj
    for claim in held:
        if claim.line.device["kind"] == "gpu":
            name = claim.line.device["name"]
            gpu_hours[name] = gpu_hours.get(name, 0.0) + claim.given / NS_PER_HOUR
        for purpose, device_ns in claim.by_purpose().items():
            by_purpose.setdefault(purpose, Spent()).device_ns += device_ns
        for day, device_ns in claim.by_day():
            by_day.setdefault(day, Spent()).device_ns += device_ns
    held_ns = sum(claim.given for claim in held)
    basis = Basis(
        energy_mj=sum(claim.given for claim in used) if used else None,
        band_j=sum(_band_j(claim) for claim in used),
        source="+".join(sorted({claim.source for claim in held if claim.given})),
        scope="+".join(sorted({claim.line.device["scope"] for claim in held if claim.given})),
        measured=all(claim.measured for claim in held),
        coverage=min(1.0, sum(_covered_ns(claim) for claim in used) / held_ns) if held_ns else 0.0,
        device_hours=held_ns / NS_PER_HOUR,
        gpu_hours=gpu_hours,
        tokens=None,
        profile=EnergyProfile(
            Piece(start_ns, end_ns, claim.utc_offset_ns, claim.upto)
            for claim in used
            for start_ns, end_ns in claim.pieces
        ),
    )
    return Half(basis, by_scope, by_purpose, by_day)


def _band_j(claim: Claim) -> float:
    """As for one run: the sensor's gain and the two ends; what was lost with a kill is not known better than itself."""
    if not claim.given or not claim.purposes:
        return claim.given / 1000
    whole_j = claim.line.energy_mj / 1000 * claim.line.device["band"]
    return claim.given / 1000 * claim.line.device["band"] + claim.line.band_j() - whole_j


def _covered_ns(claim: Claim) -> float:
    """Of the time given, what lies between two valid reads."""
    if not claim.length_ns or not claim.purposes:
        return 0.0
    given_ns = sum(end - start for start, end in claim.pieces)
    return given_ns * claim.line.track.covered_ns / claim.length_ns
