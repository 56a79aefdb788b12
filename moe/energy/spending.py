"""The totals of a programme, summed from claims: by purpose, scope, day and run, measured and estimated apart.

Purposes: `training` and `data` are steps that survive in some lineage, `lost_to_restarts` those that a restart did
again; `evaluation`, `checkpoints`, `startup_and_idle` (no phase named); `other_programs` (metered from outside with no
purpose stated, or phases of their own); `unattributed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moe.energy.claims import Claim
from moe.energy.file_fold import NS_PER_HOUR
from moe.energy.footprint.basis import Basis
from moe.energy.footprint.profile import EnergyProfile, Piece
from moe.energy.timeline import UNATTRIBUTED

__all__ = ["PURPOSES", "Half", "Programme", "RunShare", "Spent", "half_of"]

PURPOSES = (
    "training", "data", "lost_to_restarts", "evaluation", "checkpoints", "startup_and_idle", "other_programs",
    UNATTRIBUTED,
)  # fmt: skip


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

    def part(self, claim: Claim) -> Spent:
        """Where a claim belongs."""
        return self.measured if claim.measured else self.estimated

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


def half_of(used: Sequence[Claim], held: Sequence[Claim]) -> Half:
    """The total of claims on energy (`used`) and on time (`held`), all measured or all estimated."""
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
