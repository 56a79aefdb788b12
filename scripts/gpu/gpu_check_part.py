"""What every part of scripts/gpu_check shares: its options, and a record that survives when the part is killed.

A part is a file `gpu_check_NAME.py` with `run(part)`. It runs in a process of its own:

    python scripts/gpu/gpu_check_NAME.py --record FILE --work FOLDER --seconds S [--dry-run]

The record is written anew after each finding, so that a part that hangs or crashes leaves what it found before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77  # exit status of a part that could not run here, its reason being the record's last note


class Part:
    """One part at work.

    record   JSON file of what was found: {"headline": [...], "notes": [...], "data": {...}}
    work     folder for scratch files, shared by the parts; what a part leaves in `keep` goes into the packed logs
    seconds  time this part has before it is killed
    dry      tiny sizes on the CPU, to prove that every line runs
    """

    def __init__(self, record: Path, work: Path, seconds: float, dry: bool) -> None:
        self.record, self.work, self.dry = record, work, dry
        self.keep = work / "keep"
        self.keep.mkdir(parents=True, exist_ok=True)
        self._deadline = time.monotonic() + seconds
        self.failures = 0
        self.headline: list[str] = []
        self.notes: list[str] = []
        self.data: dict[str, Any] = {}

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def put(self, name: str, value: Any) -> None:
        """Add a finding."""
        self.data[name] = value
        self.save()

    def say(self, text: str) -> None:
        """Add a number worth a place in the table."""
        self.headline.append(text)
        self.save()

    def note(self, text: str) -> None:
        """Add a sentence that a reader of the numbers must know."""
        print(text, file=sys.stderr, flush=True)
        self.notes.append(text)
        self.save()

    def save(self) -> None:
        """Write the record aside and put it in place."""
        write_json(self.record, {"headline": self.headline, "notes": self.notes, "data": self.data})

    def skip(self, reason: str) -> NoReturn:
        """End the part: it has nothing to measure here."""
        self.note(reason)
        raise SystemExit(SKIPPED)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """An exception in here is noted and makes the part a failed one; the next section still runs."""
        start = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures += 1
            self.note(f"{name} failed: {type(error).__name__}: {str(error)[:600]}")
        self.data.setdefault("section_seconds", {})[name] = round(time.monotonic() - start, 2)
        self.save()

    def child(self, command: Sequence[str], log: str, limit_s: float, **environment: str) -> int | None:
        """Run a command with its output in the packed log `log`; its exit status, None when it ran out of time.

        The command stays in this process's group, so that whoever kills the part also ends what it started.
        """
        with open(self.keep / log, "ab") as output:
            try:
                return subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, limit_s),
                ).returncode
            except subprocess.TimeoutExpired:
                return None

    def tail(self, log: str, characters: int = 3000) -> str:
        """The end of a packed log."""
        file = self.keep / log
        return file.read_text(errors="replace")[-characters:] if file.is_file() else ""


def main(run: Callable[[Part], None]) -> None:
    """A part's entry: read the options, run, exit with 1 when a section failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    part = Part(options.record, options.work, options.seconds, options.dry_run)
    with part.section("whole part"):
        run(part)
    raise SystemExit(1 if part.failures else 0)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is either whole or not there; what JSON does not know is written as text."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    aside.replace(path)
