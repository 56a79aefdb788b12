"""Kill a training again and again, on a GPU whose energy is known: does its ledger tell the truth?

    scripts/soak [--kills N] [--seed S]      one JSON object a kill, then one of verdicts; exit code 1 when one is no

One run is trained to its end untouched. Another loses its process group to SIGKILL at moments that the seed draws, and
is started again each time, until it ends. The GPU is that of tests/energy/fake_nvml.c, read through nvidia-ml-py; the
training is tests/trainer's tiny recipe on the processor. Ledger and metrics are looked at as bytes on the disk, beside
`moe energy`'s own fold of them.

    checkpoint   while a checkpoint's files are being written
    power cut    anywhere; then what was not fsynced goes, from a random byte on, and the machine stays off for a while
    step         anywhere
    start        from the first instant of the process to its first steps
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moe.energy import Fold, fold_ledgers
from moe.rundir import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests" / "trainer" / "soaked_recipe.py"
KINDS = ("checkpoint", "power cut", "step", "start")
LAST_STEPS, TOKENS_A_STEP = 100, 4 * 32
WORDS = ("train.checkpoint_every_steps=20", "train.eval_every_tokens=5120")
START_S = 4.5  # of which three and a half load torch
OFF_S = (2.0, 4.0)  # with the start that follows, longer than a flush interval
INTERVAL_NS, FLUSH_NS = 10**9, 5 * 10**9  # the meter's defaults
GRAIN_NS = 10**7  # of a process's start, as /proc tells it
PATIENCE_S = 120.0

Record = dict[str, Any]


class Gpu(Protocol):
    """What fake_nvml.c is told of its GPU."""

    uuid: str
    origin_ns: int
    base_mj: int
    tick_ns: int
    power1_mw: int
    power2_mw: int
    period_ns: int


def counter_mj(gpu: Gpu, at_ns: int) -> int:
    """The truth: what the GPU's counter shows at a boottime."""
    ticked_ns = (at_ns - gpu.origin_ns) // gpu.tick_ns * gpu.tick_ns
    whole, rest_ns = divmod(ticked_ns, gpu.period_ns)
    half_ns = gpu.period_ns // 2
    mw_ns = whole * half_ns * (gpu.power1_mw + gpu.power2_mw)
    mw_ns += min(rest_ns, half_ns) * gpu.power1_mw + max(0, rest_ns - half_ns) * gpu.power2_mw
    return gpu.base_mj + mw_ns // 10**9


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@contextmanager
def _not_left_alone(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Whoever interrupts the soak ends the training too."""
    try:
        yield
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@dataclass
class Life:
    """One process, as seen from outside. It began between `forked_ns` and `running_ns`, and was alive at `alive_ns`."""

    kind: str
    pid: int
    forked_ns: int
    running_ns: int
    alive_ns: int = 0
    gone_ns: int = 0
    cut_bytes: int = 0


@dataclass
class Part:
    """One segment of the ledger, as its lines say."""

    header: Record
    last_ns: int
    readings: list[Record] = field(default_factory=list)

    @property
    def energy_mj(self) -> int:
        return self.readings[-1]["energy_mj"] - self.readings[0]["energy_mj"] if self.readings else 0


class Soak:
    """Trains the runs `whole` and `killed` in `folder`; `environment` makes NVML the fake one."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], gpu: Gpu, *, kills: int, seed: int, steps_a_kill: int
    ) -> None:
        self.folder, self.gpu, self.kills = folder, gpu, kills
        self.steps = steps_a_kill * kills + LAST_STEPS
        self.lives: list[Life] = []
        self.folded_mj: list[int] = []  # the ledger's total as each kill left it
        self._chance = random.Random(seed)
        self._fsynced = folder / "fsynced"
        self._fsynced.touch()
        self._environment = {
            **environment,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "HELD_GPU": gpu.uuid,
            "FSYNCED": str(self._fsynced),
        }
        chance = random.Random(0)
        words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
        (folder / "text").write_text(" ".join(chance.choices(words, k=9000)), encoding="utf-8")

    def run(self) -> None:
        """All lives of both runs."""
        self._end(*self._begin("whole", "end"))
        targets = sorted(self._chance.sample(range(1, self.steps - LAST_STEPS), self.kills))
        for number, target in enumerate(targets):
            life, process = self._begin("killed", KINDS[number % len(KINDS)])
            self._kill(life, process, target)
            self.lives.append(life)
            if self.ledger().is_file():
                self.folded_mj.append(fold_ledgers([self.ledger()]).total.energy_mj)
            print(json.dumps(vars(life)), file=sys.stderr, flush=True)
        life, process = self._begin("killed", "end")
        self._end(life, process)
        self.lives.append(life)

    def ledger(self) -> Path:
        return self.path("killed") / "ledger.jsonl"

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _begin(self, name: str, kind: str) -> tuple[Life, "subprocess.Popen[bytes]"]:
        command = [sys.executable, str(RECIPE), f"run.name={name}", f"train.max_steps={self.steps}", *WORDS]
        forked_ns = now_ns()
        with (self.folder / f"{name}.stderr").open("ab") as said:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self._environment, stderr=said, start_new_session=True
            )
        return Life(kind, process.pid, forked_ns, now_ns()), process

    def _end(self, life: Life, process: "subprocess.Popen[bytes]") -> None:
        life.alive_ns = now_ns()
        with _not_left_alone(process):
            code = process.wait()
        life.gone_ns = now_ns()
        if code:
            raise RuntimeError(f"the training ended with exit code {code}: {self._said()}")

    def _kill(self, life: Life, process: "subprocess.Popen[bytes]", target: int) -> None:
        with _not_left_alone(process):
            self._wait_for_its_moment(life, process, target)
        life.alive_ns = now_ns()
        if process.poll() is not None:
            raise RuntimeError(f"the training was over before its kill at step {target}: {self._said()}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        life.gone_ns = now_ns()
        if life.kind == "power cut":
            life.cut_bytes = self._cut("ledger.jsonl") + self._cut("metrics.jsonl")
            time.sleep(self._chance.uniform(*OFF_S))

    def _wait_for_its_moment(self, life: Life, process: "subprocess.Popen[bytes]", target: int) -> None:
        if life.kind == "start":
            time.sleep(self._chance.uniform(0, START_S))
        else:
            self._wait(process, lambda: self._step(life) >= target)
            if life.kind == "checkpoint":
                checkpoints = self.path("killed") / "checkpoints"
                self._wait(process, lambda: any(checkpoints.glob(f".step_*.{life.pid}")))
                time.sleep(self._chance.uniform(0, 0.01))
            else:
                time.sleep(self._chance.uniform(0, 0.5))

    def _said(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.stderr"))[-4000:]

    def _wait(self, process: "subprocess.Popen[bytes]", holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)

    def _step(self, life: Life) -> int:
        """The last step this process wrote a row of; -1 before its first."""
        try:
            with (self.path("killed") / "metrics.jsonl").open("rb") as file:
                file.seek(-min(4096, file.seek(0, os.SEEK_END)), os.SEEK_END)
                row = json.loads(file.read()[:-1].rpartition(b"\n")[2])
        except (FileNotFoundError, ValueError):  # half a row, for a moment
            return -1
        return row["train/step"] if row["boottime_ns"] > life.forked_ns else -1

    def _cut(self, name: str) -> int:
        """Take away what a power cut may: any number of the bytes behind the last fsync. Returns how many."""
        path = self.path("killed") / name
        synced = [line.split(" ", 1) for line in self._fsynced.read_text().splitlines()]
        least = max((int(size) for size, where in synced if Path(where) == path.resolve()), default=0)
        size = path.stat().st_size
        kept = self._chance.randint(least, size)
        os.truncate(path, kept)
        return size - kept


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
        self._time(self.fold)
        self._training(self.fold)

    def _energy(self, fold: Fold) -> None:
        readings = [reading for part in self.parts for reading in part.readings]
        half_ns = self.gpu.tick_ns // 2
        shown = (
            reading["energy_mj"] in [counter_mj(self.gpu, reading["boottime_ns"] + d) for d in (-half_ns, half_ns)]
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
            used_mj = counter_mj(self.gpu, life.alive_ns) - last["energy_mj"]
            told_well = told_well and told_mj == share_mj and used_mj - self.tick_mj <= told_mj <= self.flush_mj
            rows.append((life, life.gone_ns - last["boottime_ns"], told_mj))
        kept_well = all(gap <= (FLUSH_NS if life.cut_bytes else 2 * INTERVAL_NS) for life, gap, _ in rows)
        self.holds["a kill takes at most two intervals of readings, a power cut a flush interval's"] = kept_well
        self.holds["each kill is told as unattributed: no less than was used, at most a flush interval's"] = told_well
        self.numbers |= {
            "kills": len(self.soak.lives) - 1,
            "kills_before_the_first_line": len(self.soak.lives) - len(self.parts),
            "longest_unread_s": max(gap for _, gap, _ in rows) / 1e9,
            "largest_unattributed_mj": max(told for _, _, told in rows),
            "bytes_cut": sum(life.cut_bytes for life in self.soak.lives),
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
    return parts


def _column(rows: list[Record], name: str) -> list[tuple[int, float]]:
    return [(row["train/step"], row[name]) for row in rows if name in row]


def _lines(metrics: Path, name: str) -> list[str]:
    return [line for line in metrics.read_text(encoding="utf-8").splitlines() if f'"{name}"' in line]


def _files(manifest: Path) -> dict[str, Any]:
    return json.loads(manifest.read_text(encoding="utf-8"))["files"]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-a-kill", type=int, default=80)
    options = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "tests" / "energy"))
    from conftest import FakeGpu, FakeNode, _compile

    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        node = FakeNode(_compile(folder), folder)
        gpu = node.set(FakeGpu(power1_mw=317_123, power2_mw=683_001, period_ns=1_300_000_000))
        soak = Soak(folder, node.env, gpu, **vars(options))
        soak.run()
        verdicts = Verdicts(soak)
    print(json.dumps({"seed": options.seed, **verdicts.numbers, "holds": verdicts.holds}, indent=2))
    return 0 if all(verdicts.holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
