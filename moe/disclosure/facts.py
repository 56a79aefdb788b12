"""What is known of a run, for all forms alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe import accounting
from moe.config import Recipe
from moe.energy import Fold
from moe.energy.footprint import Footprint
from moe.energy.footprint.quantity import Quantity
from moe.errors import CompareError, ConfigError
from moe.rundir import RunDir

__all__ = ["METHOD_OF_FLOP", "Facts", "facts_of"]

METHOD_OF_FLOP = (
    "arithmetic, not measured: 6 x active parameters + causal attention, forward and backward, x tokens of the final "
    "lineage; recomputation and lost work are not in it"
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """`recipe` is None for what this trainer did not train; `location` is None where nobody stated one."""

    name: str
    fold: Fold
    footprint: Footprint
    recipe: Recipe | None
    environment: Mapping[str, Any]
    location: str | None

    @property
    def is_estimate(self) -> bool:
        return not self.fold.total.measured

    @property
    def energy(self) -> Quantity | None:
        """IT energy in kWh, as metered; None when nothing was read."""
        return self.footprint.numbers.get("energy_it")

    @property
    def how(self) -> str:
        """Where the energy comes from, in a sentence without full stop."""
        total = self.fold.total
        kind = "estimated as time x declared power" if self.is_estimate else "measured"
        return f"{kind}, source {total.source}, scope {total.scope}, coverage {total.coverage:.1%} of the time"

    @property
    def hardware(self) -> dict[tuple[str, str], int]:
        """Devices by (kind, name): how many different ones the run was metered on."""
        lines = [line for file in self.fold.files for part in file.segments for line in part.lines.values()]
        devices = {line.device["uuid"]: (line.device["kind"], self._name_of(line.device)) for line in lines}
        counts: dict[tuple[str, str], int] = {}
        for device in devices.values():
            counts[device] = counts.get(device, 0) + 1
        return counts

    def _name_of(self, device: Mapping[str, Any]) -> str:
        """A device's own name; that of an estimate says only its watts, so the environment is asked first."""
        recorded = self.environment.get("device_name")
        if device["source"] in ("estimate:tdp", "declared") and recorded:
            return str(recorded)
        return str(device["name"])

    @property
    def hardware_words(self) -> str:
        return ", ".join(f"{count} x {name}" for (_, name), count in self.hardware.items())

    @property
    def span(self) -> tuple[datetime, datetime]:
        """From the first start of a process to the last line of a ledger, in UTC."""
        segments = [segment for file in self.fold.files for segment in file.segments]
        first_ns = min(segment.start_ns + segment.utc_offset_ns for segment in segments)
        last_ns = max(segment.last_ns + segment.utc_offset_ns for segment in segments)
        return datetime.fromtimestamp(first_ns / 1e9, UTC), datetime.fromtimestamp(last_ns / 1e9, UTC)

    @property
    def held_s(self) -> float:
        """Seconds that processes ran on the first node, without the time between segments."""
        return sum(segment.elapsed_ns for segment in self.fold.files[0].segments) / 1e9

    @property
    def parameters(self) -> tuple[int, int] | None:
        """Parameters, total and active."""
        if self.recipe is None:
            return None
        model = self.recipe.model
        return accounting.num_parameters(model), accounting.num_parameters(model, active=True)

    @property
    def flop(self) -> float | None:
        """Operations of the final lineage; see METHOD_OF_FLOP."""
        if self.recipe is None or self.fold.tokens is None:
            return None
        return accounting.flops_per_token(self.recipe.model, self.recipe.train.seq_len) * self.fold.tokens


def facts_of(run: Path, fold: Fold, footprint: Footprint, location: str | None) -> Facts:
    """The facts of a run directory or ledger file. A place that `--grid` named is its location unless one is stated."""
    folder = RunDir(run if run.is_dir() else run.parent)
    recipe, environment = None, {}
    try:
        if run.is_dir() and folder.config.is_file():
            recipe = Recipe.from_dict(folder.read_json(folder.config))
        if run.is_dir() and folder.environment.is_file():
            environment = folder.read_json(folder.environment)
    except (ConfigError, TypeError, AttributeError) as error:
        raise CompareError(f"{folder.config} does not describe a run: {error}") from None
    grid = footprint.factors.get("grid_carbon")
    place = grid.name if grid is not None and grid.code else None
    return Facts(
        name=folder.name,
        fold=fold,
        footprint=footprint,
        recipe=recipe,
        environment=environment,
        location=location or place,
    )
