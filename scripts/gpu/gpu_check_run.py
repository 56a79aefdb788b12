"""Runs the parts of scripts/gpu_check one after another, each in its own process, and packs what they found.

A part that fails, crashes or hangs costs its own time limit and nothing else: its process group is killed and the next
part runs. Time that is saved goes to later parts; a part for which too little is left is skipped, and says so.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_check_fake import fake_environment
from gpu_check_part import ROOT, SKIPPED, write_json

BUDGET_S = 540.0
LOG_BYTES = 4_000_000  # the end of a longer log is kept
MARGIN_S = 10.0  # for packing, and for a part that dies slowly


@dataclass(frozen=True)
class PartPlan:
    """A part is killed after `limit_s`, and not begun with less than `least_s`; `command` replaces its file (tests)."""

    name: str
    limit_s: float
    least_s: float
    command: tuple[str, ...] = ()


PLANS = (
    PartPlan("environment", 45, 10),
    PartPlan("nvml_probe", 150, 45),
    PartPlan("kernels", 220, 30),
    PartPlan("bench_kernels", 300, 60),
    PartPlan("metered_runs", 190, 80),
    PartPlan("kernel_energy", 120, 60),
    PartPlan("attribution", 130, 110),
)


@dataclass
class Result:
    """How a part ended: ok, failed or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    headline: list[str] = field(default_factory=list)


class Check:
    """One run of the parts into one folder."""

    def __init__(
        self,
        out: Path,
        work: Path,
        budget_s: float,
        environment: Mapping[str, str],
        dry: bool,
        start: float | None = None,
    ) -> None:
        self.out, self.work, self.budget_s, self.dry = out, work, budget_s, dry
        self.environment = dict(environment)
        self.results: list[Result] = []
        self._start = time.monotonic() if start is None else start
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        (work / "keep").mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def run(self, plans: Sequence[PartPlan]) -> None:
        """Run every part; the summary and the packed logs are whole after each."""
        for index, plan in enumerate(plans):
            left = self.budget_s - MARGIN_S - self.seconds
            limit = min(plan.limit_s, left - sum(later.least_s for later in plans[index + 1 :]))
            if limit < plan.least_s:
                limit = min(plan.limit_s, left)  # better one part whole than each of them cut short
            if limit < plan.least_s:
                reason = f"{max(0.0, left):.0f} s of {self.budget_s:.0f} s are left, it needs {plan.least_s:.0f}"
                self.results.append(Result(plan.name, "skipped", reason=reason))
                write_json(self.out / f"{plan.name}.json", {"part": plan.name, "status": "skipped", "reason": reason})
            else:
                print(f"{plan.name} (at most {limit:.0f} s)", file=sys.stderr, flush=True)
                self.results.append(self._run(plan, limit))
            self._pack()

    def _run(self, plan: PartPlan, limit_s: float) -> Result:
        record, log = self.work / f"{plan.name}.json", self.work / "keep" / f"{plan.name}.log"
        command = list(plan.command) or [
            sys.executable, "-B", str(ROOT / "scripts" / "gpu" / f"gpu_check_{plan.name}.py"), "--record", str(record),
            "--work", str(self.work), "--seconds", f"{limit_s - 3:.1f}", *(["--dry-run"] if self.dry else []),
        ]  # fmt: skip
        start, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill_group(process)
        found = _read(record)
        result = Result(plan.name, "ok", time.monotonic() - start, headline=found["headline"])
        if code == SKIPPED:
            result.status, result.reason = "skipped", (found["notes"] or ["it said no reason"])[-1]
        elif code != 0:
            result.status = "failed"
            result.reason = _reason(code, limit_s, found["notes"], log)
        envelope = {
            "part": plan.name, "status": result.status, "reason": result.reason, "seconds": round(result.seconds, 1),
            "limit_s": round(limit_s, 1), "dry_run": self.dry, "started_utc": started, "command": command[1:],
        }  # fmt: skip
        if code != 0:
            envelope["log_tail"] = log.read_text(errors="replace")[-4000:]
        write_json(self.out / f"{plan.name}.json", {**envelope, **found})
        return result

    def _pack(self) -> None:
        summary = {
            "what": "scripts/gpu_check", "dry_run": self.dry, "started_utc": self._started, "host": platform.node(),
            "seconds": round(self.seconds, 1), "budget_s": self.budget_s, "parts": [asdict(r) for r in self.results],
        }  # fmt: skip
        write_json(self.out / "summary.json", summary)
        trace = self.work / "nvml_trace.json"
        if trace.is_file():
            shutil.copyfile(trace, self.out / trace.name)
        for log in (self.work / "keep").rglob("*.log"):
            if log.stat().st_size > LOG_BYTES:
                log.write_bytes(b"(cut)\n" + log.read_bytes()[-LOG_BYTES:])
        aside = self.work / "logs.tar.gz"
        with tarfile.open(aside, "w:gz") as archive:
            archive.add(self.work / "keep", arcname="logs")
        shutil.copyfile(aside, self.out / aside.name)

    def table(self) -> str:
        """Name, result, seconds and headline numbers, one part a line."""
        width = max(len(r.name) for r in self.results)
        lines = [f"{'part':<{width}}  {'result':<7}  {'s':>5}  headline"]
        for r in self.results:
            words = "; ".join([*([r.reason] if r.status != "ok" else []), *r.headline])
            lines.append(f"{r.name:<{width}}  {r.status:<7}  {r.seconds:>5.0f}  {' '.join(words.split())[:600]}")
        counts = [f"{sum(r.status == status for r in self.results)} {status}" for status in ("ok", "failed", "skipped")]
        dry = "dry run on the CPU, no measurement: " if self.dry else ""
        lines.append(f"{dry}{', '.join(counts)} in {self.seconds:.0f} s of {self.budget_s:.0f} s; records: {self.out}")
        return "\n".join(lines)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End what a part left running. A process stuck in the driver cannot be waited for: the next part runs anyway."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not die; going on", file=sys.stderr)


def _read(record: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {"headline": [], "notes": [], "data": {}}


def _reason(code: int | None, limit_s: float, notes: list[str], log: Path) -> str:
    if code is None:
        return f"killed at its limit of {limit_s:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = (log.read_text(errors="replace").strip().splitlines() or [f"exit status {code}"])[-1]
    return notes[-1] if notes else last


def part_environment(dry: bool) -> dict[str, str]:
    """What parts run under: this repository importable without being installed, no launcher's or meter's leavings."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MOE_LEDGER")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher and not name.startswith(("ACCELERATE_", "TRITON_INTERPRET", "PYTEST_"))
    }
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [environment.get("PYTHONPATH")])]
    environment.update(
        PYTHONPATH=os.pathsep.join(paths), PYTHONDONTWRITEBYTECODE="1", PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1"
    )
    if dry:
        environment.update(CUDA_VISIBLE_DEVICES="")
    return environment


def cuda_obstacle(environment: Mapping[str, str]) -> str | None:
    """Why this machine cannot be measured, in a sentence; asked in another process, because a sick driver hangs."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True, timeout=90
        )
    except subprocess.TimeoutExpired:
        return "CUDA did not answer within 90 s: look at `nvidia-smi` before measuring on this machine."
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        return f"torch cannot be imported by {sys.executable} ({last}): set PYTHON to one that has it."
    if asked.stdout.split()[-1:] == ["0"]:
        return "No CUDA GPU is visible: run this on a GPU machine, or give --dry-run to try the script on the CPU."
    return None


def main(words: Sequence[str] | None = None) -> int:
    """Command line. 0: every part that ran was ok; 1: a part failed; 2: no GPU, or a wrong argument."""
    names = [plan.name for plan in PLANS]
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", usage="scripts/gpu_check [--out DIR] [--minutes M] [--only PART …] [--dry-run]",
        description="Measure this GPU machine: sensors, kernels, benchmark, two metered training runs, joules.",
    )  # fmt: skip
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = ROOT / "runs" / "gpu_check" / stamp
    parser.add_argument("--out", type=Path, default=folder, help="folder of the records (runs/gpu_check/TIME)")
    parser.add_argument("--minutes", type=float, default=BUDGET_S / 60, help="time for everything (default: 9)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="every part at tiny size on the CPU; measures nothing")
    options = parser.parse_args(words)
    start = time.monotonic()
    environment = part_environment(options.dry_run)
    if not options.dry_run and (obstacle := cuda_obstacle(environment)):
        print(obstacle, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part at work is ended with us
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        if options.dry_run:
            environment.update(fake_environment(work, environment))
        check = Check(options.out.resolve(), work, options.minutes * 60, environment, options.dry_run, start)
        check.run([plan for plan in PLANS if plan.name in options.only])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(check.table(), flush=True)
    return 1 if any(result.status == "failed" for result in check.results) else 0


if __name__ == "__main__":
    sys.exit(main())
