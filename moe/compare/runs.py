"""One run as a comparison sees it: what it is, what it cost, and its evaluations priced by the ledger.

Tokens are those of the final lineage; device-hours and energy are everything the run spent, the work a restart threw
away included: that was paid for too.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe import accounting
from moe.config import Recipe
from moe.errors import CompareError, ConfigError
from moe.rundir import RunDir, read_metrics

if TYPE_CHECKING:
    from moe.energy import Fold

__all__ = ["EvalPoint", "Run", "load_run", "load_runs", "printable", "same_part"]


@dataclass(frozen=True, kw_only=True)
class EvalPoint:
    """One evaluation of the final lineage. Costs count from the start of the run to this evaluation."""

    step: int
    tokens: int
    device_hours: float
    energy_j: float | None
    loss: float  # nats per token
    loss_se: float | None  # standard error over validation sequences, nats per token
    bits_per_byte: float | None
    sequences: int | None  # the first so many of the validation text; None is all of it


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, read from its directory. `measured` is false when its energy is an estimate or missing."""

    name: str
    path: Path
    recipe: Recipe
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    curve: tuple[EvalPoint, ...]
    tokens: int
    tokens_processed: int
    device_hours: float
    useful_device_hours: float | None
    energy_j: float | None
    energy_source: str
    energy_scope: str
    energy_band_j: float
    energy_gain: float  # the part of the band that is sensor gain, as a share of the energy
    measured: bool
    coverage: float
    devices: int
    device_uuids: frozenset[str]
    meter_notes: tuple[str, ...]
    computed_share: float | None = None  # of choices of experts, those of real ones; None without null ones

    @property
    def parameters_total(self) -> int:
        return accounting.num_parameters(self.recipe.model)

    @property
    def parameters_active(self) -> int:
        return accounting.num_parameters(self.recipe.model, active=True)

    @property
    def evaluated(self) -> tuple[int, frozenset[int | None]]:
        """What its losses are means over: tokens a sequence, and how many sequences (None: all there are)."""
        return self.recipe.train.seq_len, frozenset(point.sequences for point in self.curve)

    @property
    def flops_per_token(self) -> float:
        """What the routers really chose, where some choices are null; else what the configuration says."""
        return accounting.flops_per_token(self.recipe.model, self.recipe.train.seq_len, self.computed_share)

    @property
    def hardware(self) -> str:
        """What the device-hours count, such as `4 x NVIDIA H200`; ranks are told where they are not one a device."""
        ranks = self.environment.get("world_size") or self.devices
        return f"{self.devices} x {self.device_name}" + ("" if ranks == self.devices else f", {ranks} ranks")

    @property
    def device_name(self) -> str:
        """One device in words."""
        name = self.environment.get("device_name") or self.environment.get("device_type") or "unknown device"
        return printable(str(name))


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs at `paths`, with names that tell them apart. Raises CompareError for a path given twice."""
    runs: list[Run] = []
    for path in paths:
        run = load_run(path)
        if any(run.path == other.path for other in runs):
            raise CompareError(f"{printable(str(path))} is given twice; give each run once, as RUN or as --baseline")
        runs.append(run)
    return _distinguish(runs)


def load_run(path: str | Path) -> Run:
    """Read one run directory. Raises CompareError, in one sentence, for what a comparison cannot do without."""
    from moe.energy import fold_ledgers

    directory = RunDir.existing(path)
    name = printable(directory.name)
    try:
        recipe = Recipe.from_dict(_object(directory, directory.config))
    except (ConfigError, TypeError, AttributeError) as error:
        raise CompareError(f"{printable(str(directory.config))} does not describe a run: {error}") from None
    ledgers = directory.ledgers()
    if not ledgers:
        raise CompareError(f"{name} has no ledger.jsonl, so what it cost is unknown; run it again with the meter on")
    rows = read_metrics(directory.metrics)
    fold = fold_ledgers(ledgers)
    _check_whole(name, rows, fold)
    total = fold.total
    data = _object(directory, directory.data)
    shares = [row["router/computed_share"] for row in rows if "router/computed_share" in row]
    curve = [_point(name, row, fold, recipe, data) for row in rows if "eval/loss" in row]
    if not curve:
        raise CompareError(f"{name} has no evaluation yet, so it has no loss to compare; let it reach its first one")
    return Run(
        name=name,
        path=directory.root.resolve(),
        recipe=recipe,
        data=data,
        environment=_object(directory, directory.environment),
        curve=tuple(curve),
        tokens=max(row.get("train/tokens", 0) for row in rows),
        tokens_processed=_tokens_processed(directory.metrics),
        device_hours=total.device_hours,
        useful_device_hours=total.useful_device_hours,
        energy_j=total.energy_j,
        energy_source=total.source,
        energy_scope=total.scope,
        energy_band_j=total.band_j,
        energy_gain=_gain(fold),
        measured=total.measured and total.energy_j is not None,
        coverage=total.coverage,
        devices=fold.devices_at_once,
        device_uuids=frozenset(device.uuid for device in fold.devices),
        meter_notes=tuple(printable(note) for note in fold.notes),
        computed_share=statistics.fmean(shares) if shares else None,
    )


def same_part(runs: Sequence[Run]) -> bool:
    """Whether the evaluations of all runs took the same part of a validation text, in sequences of one length.

    As many sequences of another tokenizer are another part of the text, unless it is all of it.
    """
    kinds = {run.evaluated for run in runs}
    tokenizers = {run.data.get("tokenizer_sha256") for run in runs}
    (_, parts), *others = kinds
    return not others and (parts == {None} or (len(parts) == 1 and len(tokenizers) == 1))


def printable(text: str) -> str:
    """`text` with control characters replaced, so that a name in a file cannot steer the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _object(directory: RunDir, path: Path) -> dict[str, Any]:
    value = directory.read_json(path)
    if not isinstance(value, dict):
        raise CompareError(f"{printable(str(path))} does not hold a JSON object; restore it or run again")
    return value


def _check_whole(name: str, rows: Sequence[Mapping[str, Any]], fold: "Fold") -> None:
    """Refuse a run whose ledger was begun anew in the middle: the steps before would look free."""
    begun = fold.files[0].segments[0].header["resumed_step"] if fold.files[0].segments else 0
    if rows and rows[0]["train/step"] < begun:
        raise CompareError(
            f"{name} was trained before its ledger begins at step {begun}, so what it cost is not known; "
            "restore the ledger from a copy, or compare other runs"
        )


def _point(name: str, row: Mapping[str, Any], fold: "Fold", recipe: Recipe, data: Mapping[str, Any]) -> EvalPoint:
    step = row["train/step"]

    def optional(key: str) -> float | None:
        return None if row.get(key) is None else float(row[key])

    try:
        loss, tokens = float(row["eval/loss"]), int(row["train/tokens"])
        error, bits = optional("eval/loss_se"), optional("eval/bits_per_byte")
        segment, boottime_ns = int(row["segment"]), int(row["boottime_ns"])
        counted = optional("eval/sequences")
    except (KeyError, TypeError, ValueError):
        raise CompareError(f"{name}: the evaluation at step {step} is incomplete in metrics.jsonl") from None
    if not all(math.isfinite(number) for number in (loss, error or 0.0, bits or 0.0, counted or 0.0)):
        raise CompareError(f"{name}: the loss of the evaluation at step {step} is not finite; the run diverged")
    energy_j, device_hours = fold.at(segment, boottime_ns)
    return EvalPoint(
        step=step,
        tokens=tokens,
        device_hours=device_hours,
        energy_j=energy_j,
        loss=loss,
        loss_se=error,
        bits_per_byte=bits,
        sequences=_part(counted, recipe, data),
    )


def _part(counted: float | None, recipe: Recipe, data: Mapping[str, Any]) -> int | None:
    """How many validation sequences an evaluation took, as its row or else the recipe tells; None for all of them."""
    wanted = recipe.train.eval_sequences
    tokens = data.get("validation_tokens")
    if not isinstance(tokens, int):  # how many there are was not recorded
        return None if wanted is None else int(wanted if counted is None else counted)
    held = tokens // recipe.train.seq_len
    taken = (held if wanted is None else wanted) if counted is None else int(counted)
    return taken if taken < held else None


def _gain(fold: "Fold") -> float:
    """Declared sensor gain error of the whole run, as a share: the devices' own, weighted by their energy."""
    lines = [line for file in fold.files for segment in file.segments for line in segment.lines.values()]
    energy_mj = sum(line.energy_mj for line in lines)
    return sum(line.energy_mj * line.device["band"] for line in lines) / energy_mj if energy_mj else 0.0


def _tokens_processed(metrics: Path) -> int:
    """Tokens of all segments, those of work a restart threw away included. A step has the same tokens throughout."""
    resumed: dict[int, int] = {}
    last: dict[int, tuple[int, int]] = {}
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill
        if "resumed_step" in row:
            resumed[row["segment"]] = row["resumed_step"]
        elif "train/tokens" in row:
            last[row["segment"]] = (row["train/step"], row["train/tokens"])
    return sum(
        round(tokens * (step - resumed.get(segment, 0)) / step) for segment, (step, tokens) in last.items() if step
    )


def _distinguish(runs: list[Run]) -> list[Run]:
    """Runs whose folders are called alike get as many parent folders into their name as it takes."""
    named = runs
    for depth in range(2, 1 + max((len(run.path.parts) for run in runs), default=0)):
        names = [run.name for run in named]
        if len(set(names)) == len(names):
            break
        named = [
            dataclasses.replace(run, name=printable("/".join(run.path.parts[-depth:])))
            if names.count(run.name) > 1
            else run
            for run in named
        ]
    return named
