"""What a finished soak must say, sentence by sentence: from the ledger's bytes, and from the fold of them."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soak_lives import Life, Soak

from moe.energy import Fold, fold_ledgers
from moe.energy.phases import LOST, STEP_PHASES
from moe.rundir import read_metrics

FLUSH_NS = 5 * 10**9  # the meter's default
GRAIN_NS = 10**7  # of a process's start, as /proc tells it
TOKENS_A_STEP = 4 * 32

Record = dict[str, Any]


@dataclass
class Part:
    """One segment of the ledger, as its lines say."""

    header: Record
    last_ns: int
    readings: list[Record] = field(default_factory=list)
    other_work_s: float = 0.0  # since the first reading, in phases that are no part of a step

    @property
    def energy_mj(self) -> int:
        return self.readings[-1]["energy_mj"] - self.readings[0]["energy_mj"] if self.readings else 0


class Verdicts:
    """What the finished soak says: `numbers` to write down, and `holds`, a sentence for each thing that must be."""

    def __init__(self, soak: Soak) -> None:
        self.soak, self.gpu = soak, soak.gpu
        self.fold = fold_ledgers([soak.ledger()])
        self.parts = _parts(soak.ledger())
        self.lost_mj = [round(part.unattributed_j * 1000) for part in self.fold.segments]
        self.tick_mj = soak.gpu.tick_ns * max(soak.gpu.power1_mw, soak.gpu.power2_mw) // 10**9
        self.flush_mj = FLUSH_NS * (soak.gpu.power1_mw + soak.gpu.power2_mw) // 2 // 10**9 + 2 * self.tick_mj
        self.numbers: dict[str, Any] = {}
        self.holds: dict[str, bool] = {}
        self._energy(self.fold)
        self._kills()
        self._lost_work(self.fold)
        self._time(self.fold)
        self._training(self.fold)

    def _energy(self, fold: Fold) -> None:
        readings = [reading for part in self.parts for reading in part.readings]
        half_ns = self.gpu.tick_ns // 2
        shown = (
            reading["energy_mj"] in [self.gpu.counter_mj(reading["boottime_ns"] + d) for d in (-half_ns, half_ns)]
            for reading in readings
        )
        self.holds["every reading is what the counter showed within half a tick of its time"] = all(shown)
        read = [part for part in self.parts if part.readings]
        dead_mj = [
            later.readings[0]["energy_mj"] - earlier.readings[-1]["energy_mj"]
            for earlier, later in itertools.pairwise(read)
        ]
        whole_mj = readings[-1]["energy_mj"] - readings[0]["energy_mj"]
        not_billed_mj = sum(dead_mj) - sum(self.lost_mj)
        self.holds["total + not billed = the counter's last - first reading, to the millijoule"] = (
            fold.total.energy_mj == sum(part.energy_mj for part in self.parts) + sum(self.lost_mj)
            and fold.total.energy_mj + not_billed_mj == whole_mj
        )
        phases_mj = sum(phase.energy_mj for phase in fold.phases.values())
        self.holds["phases sum to the total, to the millijoule"] = phases_mj == fold.total.energy_mj
        rising = [*self.soak.folded_mj, fold.total.energy_mj]
        self.holds["the total never falls from kill to kill"] = rising == sorted(rising)
        self.numbers |= {
            "segments": len(self.parts),
            "readings": len(readings),
            "counter_mj": whole_mj,
            "total_mj": fold.total.energy_mj,
            "unattributed_mj": sum(self.lost_mj),
            "not_billed_mj": not_billed_mj,
        }

    def _kills(self) -> None:
        """What each kill cost: from the last reading kept to the last moment the process was seen alive."""
        rows, told_well = [], True
        read = [(number, part) for number, part in enumerate(self.parts) if part.readings]
        for (_, part), (number, _) in itertools.pairwise(read):
            life, last, told_mj = self._life(part), part.readings[-1], self.lost_mj[number]
            first = self.parts[number].readings[0]
            between_mj, between_ns = (first[name] - last[name] for name in ("energy_mj", "boottime_ns"))
            share_mj = between_mj if between_ns <= FLUSH_NS else between_mj * FLUSH_NS // between_ns
            used_mj = self.gpu.counter_mj(life.alive_ns) - last["energy_mj"]
            told_well = told_well and told_mj == share_mj and used_mj - self.tick_mj <= told_mj <= self.flush_mj
            rows.append((life, life.gone_ns - last["boottime_ns"], told_mj))
        self.holds["a kill takes at most a flush interval of readings"] = all(gap <= FLUSH_NS for _, gap, _ in rows)
        self.holds["each kill is told as unattributed: no less than was used, at most a flush interval's"] = told_well
        self.numbers |= {
            "kills": len(self.soak.lives) - 1,
            "kills_before_the_first_line": len(self.soak.lives) - len(self.parts),
            "longest_unread_s": max(gap for _, gap, _ in rows) / 1e9,
            "largest_unattributed_mj": max(told for _, _, told in rows),
            "bytes_cut": sum(life.cut_bytes for life in self.soak.lives),
        }

    def _lost_work(self, fold: Fold) -> None:
        """Lives without a checkpoint: all their steps were done again, so none of their joules is training's."""
        (file,) = fold.files
        lost_mj, exact, whole = [], True, True
        for segment, part, end in zip(file.segments, self.parts, file.lineage_ends(), strict=True):
            if self._life(part).kind != "rare" or not part.readings:
                continue
            purposes, _ = segment.purposes(self.gpu.uuid, end or 0)
            lost_mj.append(purposes.get(LOST, 0))
            kept_mj = purposes.get("training", 0) + purposes.get("data", 0)
            exact = exact and kept_mj == 0 and sum(purposes.values()) == part.energy_mj
            most_mw = max(self.gpu.power1_mw, self.gpu.power2_mw)
            whole = whole and lost_mj[-1] >= part.energy_mj - round(part.other_work_s * most_mw)
        self.holds["of work since the last checkpoint nothing is told as training, to the millijoule"] = exact
        self.holds["that work is told as lost, but for the time of evaluations and of the start"] = whole and all(
            lost_mj
        )
        self.numbers |= {
            "kills_with_rare_checkpoints": len(lost_mj),
            "lost_between_rare_checkpoints_mj": sum(lost_mj),
        }

    def _time(self, fold: Fold) -> None:
        billed_ns, lived_ns, unseen_ns, tails = 0, 0, 0, []
        starts = True
        pids = {part.header["pid"] for part in self.parts}
        for part in self.parts:
            life, start_ns = self._life(part), part.header["started_boottime_ns"]
            starts = starts and life.forked_ns - GRAIN_NS <= start_ns <= life.running_ns
            billed_ns += part.last_ns - start_ns
            tails.append(life.gone_ns - part.last_ns)
        for life in self.soak.lives:
            lived_ns += life.gone_ns - life.forked_ns
            unseen_ns += 0 if life.pid in pids else life.gone_ns - life.forked_ns
        self.holds["device-hours are the processes' lives from their starts to their last lines, exactly"] = (
            starts and fold.total.device_hours == billed_ns / 3.6e12
        )
        self.holds["no last line is further than a flush interval from the end of its process"] = (
            max(tails) <= FLUSH_NS and min(tails) >= 0
        )
        self.numbers |= {
            "device_s": billed_ns / 1e9,
            "lived_s": lived_ns / 1e9,
            "lived_before_the_first_line_s": unseen_ns / 1e9,
            "longest_after_the_last_line_s": max(tails) / 1e9,
        }

    def _training(self, fold: Fold) -> None:
        killed, whole = (self.soak.path(name) for name in ("killed", "whole"))
        rows, expected = (read_metrics(path / "metrics.jsonl") for path in (killed, whole))
        for name in ("train/loss", "eval/loss"):
            same = _column(rows, name) == _column(expected, name)
            self.holds[f"{name} is bitwise that of the run nobody killed, each step once"] = same
        last = f"checkpoints/step_{self.soak.steps:08d}/manifest.json"
        self.holds["the last checkpoint's weights, moments and random states are those of the run nobody killed"] = all(
            _files(killed / last)[name] == _files(whole / last)[name]
            for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors")
        )
        tokens = self.soak.steps * TOKENS_A_STEP
        resumed = [(part.header["resumed_step"] * TOKENS_A_STEP, part.header["resumed_tokens"]) for part in self.parts]
        self.holds["tokens are steps times tokens a step, in every segment and in total"] = (
            fold.tokens == tokens and all(a == b for a, b in resumed)
        )
        costs = [_column(rows, name) for name in ("energy/total_kwh", "train/device_hours")]
        self.holds["what the rows say the run cost never falls"] = all(
            [cost for _, cost in column] == sorted(cost for _, cost in column) for column in costs
        )
        live_mj, live_hours = round(costs[0][-1][1] * 3.6e9), costs[1][-1][1]
        end_mj, end_hours = fold.total.energy_mj - live_mj, fold.total.device_hours - live_hours
        self.holds["the last row's cost is the ledger's, but for what came after it"] = (
            0 <= end_mj <= self.flush_mj and 0 <= end_hours <= FLUSH_NS / 3.6e12
        )
        left = {path.name for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")}
        self.holds["no half checkpoint is left"] = not left
        self.numbers |= {
            "steps": self.soak.steps,
            "steps_done_again": len(_lines(killed / "metrics.jsonl", "train/loss")) - self.soak.steps,
            "tokens": fold.tokens,
            "final_loss": _column(rows, "train/loss")[-1][1],
        }

    def _life(self, part: Part) -> Life:
        return next(life for life in self.soak.lives if life.pid == part.header["pid"])


def _parts(ledger: Path) -> list[Part]:
    parts: list[Part] = []
    for record in map(json.loads, ledger.read_text(encoding="utf-8").splitlines()):
        if record["kind"] == "segment":
            parts.append(Part(record, record["boottime_ns"]))
        parts[-1].last_ns = max(parts[-1].last_ns, record["boottime_ns"])
        if record["kind"] == "reading":
            parts[-1].readings.append(record)
        if record["kind"] == "mark" and parts[-1].readings:
            parts[-1].other_work_s += sum(s for name, s in record["phase_s"].items() if name not in STEP_PHASES)
    return parts


def _column(rows: list[Record], name: str) -> list[tuple[int, float]]:
    return [(row["train/step"], row[name]) for row in rows if name in row]


def _lines(metrics: Path, name: str) -> list[str]:
    return [line for line in metrics.read_text(encoding="utf-8").splitlines() if f'"{name}"' in line]


def _files(manifest: Path) -> dict[str, Any]:
    return json.loads(manifest.read_text(encoding="utf-8"))["files"]
