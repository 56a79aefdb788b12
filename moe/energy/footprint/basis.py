"""What a footprint is made of: energy and time, of one run or of a whole programme of them."""

from dataclasses import dataclass, replace

from moe.energy.file_fold import NS_PER_HOUR
from moe.energy.fold import Fold
from moe.energy.footprint.profile import EnergyProfile
from moe.energy.node import NodeReconciliation

__all__ = ["Basis"]


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Energy, None when nothing was read, with its band; what was held, in hours; when it was used.

    gpu_hours  device-hours by the name the driver gives, accelerators only
    tokens     those of the final lineage; None where there is no such thing
    first_step the step at which the counted energy begins: above 0, tokens hold more than it was used for
    """

    energy_mj: int | None
    band_j: float
    source: str
    scope: str
    measured: bool
    coverage: float
    device_hours: float
    gpu_hours: dict[str, float]
    tokens: int | None
    profile: EnergyProfile
    first_step: int = 0

    @classmethod
    def of_run(cls, fold: Fold) -> "Basis":
        """That of one folded run."""
        total, gpu_hours = fold.total, dict[str, float]()
        for segment in (segment for file in fold.files for segment in file.segments):
            for line in segment.lines.values():
                if line.device["kind"] == "gpu":
                    name = line.device["name"]
                    gpu_hours[name] = gpu_hours.get(name, 0.0) + segment.elapsed_ns / NS_PER_HOUR
        return cls(
            energy_mj=None if total.energy_j is None else total.energy_mj,
            band_j=total.band_j,
            source=total.source,
            scope=total.scope,
            measured=total.measured,
            coverage=total.coverage,
            device_hours=total.device_hours,
            gpu_hours=gpu_hours,
            tokens=fold.tokens,
            profile=EnergyProfile.of_run(fold),
            first_step=next((file.segments[0].header["resumed_step"] for file in fold.files if file.segments), 0),
        )

    def on_nodes(self, nodes: NodeReconciliation) -> "Basis":
        """The same with the energy of the nodes the devices are in, over the time it is known for, in its place."""
        stretches = [(piece.start_ns, piece.end_ns, round(piece.energy_j * 1000)) for piece in nodes.pieces]
        return replace(
            self,
            energy_mj=sum(energy_mj for _, _, energy_mj in stretches),
            band_j=nodes.band_j,
            source=nodes.source,
            scope="node",
            measured=True,
            coverage=nodes.coverage,
            profile=EnergyProfile.of_stretches(stretches),
        )
