"""The run directory: its paths, its files' schemas, their writers and readers. Standard library only.

    runs/NAME/
      config.json        the resolved recipe, one object per section
      environment.json   commit, versions, devices, launch
      data.json          hashes of corpus, splits and tokenizer; tokens and bytes of the validation split
      tokenizer.json     the tokenizer the run was trained with; tokenizer_config.json names its end-of-text token
      tokens/            its text as tokens, a prepared folder a source; made again when it is missing
      metrics.jsonl      append-only, one object a line (below)
      ledger.jsonl       energy ledger of the first node; ledger.nodeN.jsonl on the others
      checkpoints/       step_NNNNNNNN/ with a manifest of checksums
      memory.json        bytes expected, by part, and the peak of the last segment
      skipped.json       batches that rollbacks passed over, when there were any
      profile/           traces of torch's profiler, when they were asked for
      tracking.json      the run's ids in the trackers it was shown in
      branch.json        of a run made by `moe branch`: which trunk it left, where, and what that had cost

The trainer writes these files; tracking, `moe compare` and `moe energy` read them, offline, as often as wanted.

A metrics line is `{"segment": n, "utc": s, "boottime_ns": n, "train/step": n, …}`. A segment is one process lifetime;
its first line also carries `"resumed_step"`, the step of the checkpoint it started from. Work after that step in
earlier segments was lost, and `read_metrics` leaves it out.
"""

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.errors import CompareError, ConfigError

__all__ = ["MetricsWriter", "RunDir", "read_metrics", "write_json"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunDir:
    """Paths of one run. Creating the object touches no file; `create` makes the directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.config = self.root / "config.json"
        self.environment = self.root / "environment.json"
        self.data = self.root / "data.json"
        self.tokenizer = self.root / "tokenizer.json"
        self.tokenizer_config = self.root / "tokenizer_config.json"
        self.tokens = self.root / "tokens"
        self.metrics = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.skipped = self.root / "skipped.json"
        self.profile = self.root / "profile"
        self.memory = self.root / "memory.json"
        self.branch = self.root / "branch.json"

    @classmethod
    def named(cls, name: str, runs: str | Path = "runs") -> "RunDir":
        """The directory `runs/NAME`. Raises ConfigError for a name that is not a plain folder name."""
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"run.name={name!r} must be a plain folder name: letters, digits, '.', '_' and '-', "
                "starting with a letter or digit"
            )
        return cls(Path(runs) / name)

    @classmethod
    def existing(cls, path: str | Path) -> "RunDir":
        """The run at `path`. Raises CompareError when it is not a run directory."""
        run = cls(path)
        if not run.root.is_dir():
            raise CompareError(f"{run.root} is not a directory; give a run directory such as runs/NAME")
        if not run.config.is_file():
            raise CompareError(f"{run.root} holds no config.json; give a run directory such as runs/NAME")
        return run

    @property
    def name(self) -> str:
        return self.root.resolve().name

    def ledger(self, node: int = 0) -> Path:
        """Where the energy ledger of node `node` (0 is the first) is written."""
        return self.root / ("ledger.jsonl" if node == 0 else f"ledger.node{node}.jsonl")

    def ledgers(self) -> list[Path]:
        """The ledgers present, the first node's first."""
        numbers = (
            re.fullmatch(r"ledger\.node(\d+)\.jsonl", path.name) for path in self.root.glob("ledger.node*.jsonl")
        )
        others = sorted(int(match[1]) for match in numbers if match)
        return [path for path in map(self.ledger, [0, *others]) if path.is_file()]

    def create(self) -> None:
        """Make the directory and prove it can be written. Raises ConfigError naming run.name otherwise."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.root / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"run.name={self.name!r}: {self.root} cannot be written ({error.strerror}); "
                "choose another folder with run.directory=PATH or mend its permissions"
            ) from None

    def read_json(self, path: Path) -> dict[str, Any]:
        """One of the run's JSON files. Raises CompareError when it is missing or not JSON."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CompareError(f"{path} is missing; the run did not get as far as writing it") from None
        except OSError as error:
            raise CompareError(f"{path} cannot be read ({error.strerror})") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CompareError(f"{path} is not valid JSON ({error}); restore it or run again") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` beside `path`, fsync, rename: readers see the old file or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class MetricsWriter:
    """Appends rows to metrics.jsonl, one line each, written whole so that a kill tears at most the last."""

    def __init__(self, path: Path, *, segment: int, resumed_step: int) -> None:
        self._segment = segment
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")  # a kill tore the last line: end it, readers skip what does not parse
        self._pending = b""
        self._path = path
        self.append({"resumed_step": resumed_step, "train/step": resumed_step})

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, with segment and clocks. Rows a full disk refuses wait in memory; stderr says so once."""
        stamp = {
            "segment": self._segment,
            "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "boottime_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        }
        complained, self._pending = bool(self._pending), self._pending + (json.dumps({**stamp, **row}) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._fd, self._pending) :]
        except OSError as error:
            if not complained:
                print(f"{self._path} cannot be written ({error.strerror}): rows are kept in memory", file=sys.stderr)

    def sync(self) -> None:
        """Put what was written on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        self.sync()
        os.close(self._fd)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of the final lineage in order: for each step the last segment's, without work a restart threw away.

    A torn line is skipped. Raises CompareError when the file is missing, or a row names no segment or step, or one that
    is no count.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CompareError(f"{path} cannot be read ({error.strerror}); did the run start?") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or "segment" not in row or "train/step" not in row:
            raise CompareError(f"{path} line {number} has no segment or train/step; is it a metrics file?")
        for name in ("segment", "train/step", "resumed_step"):
            if not _is_count(row.get(name, 0)):
                raise CompareError(
                    f"{path} line {number} says {name} is {row[name]!r:.40}, not a count; restore the file"
                )
        if "resumed_step" in row:
            resumed = row["resumed_step"]  # 0 starts anew: not even the evaluation before the first step is kept
            rows = [kept for kept in rows if 0 < resumed >= kept["train/step"]]
        else:
            rows.append(row)
    return rows


def _is_count(value: Any) -> bool:
    """Whether a number from a file is a whole one from zero on; JSON's true is none."""
    return type(value) is int and value >= 0
