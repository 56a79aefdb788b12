"""The checkpoints of a run, and whether each is whole, as far as can be told without reading them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe.errors import CheckpointError
from moe.rundir import RunDir

__all__ = ["Checkpoint", "check_sizes", "read_checkpoints"]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint; `fault` says in a sentence why it is not whole."""

    name: str
    size_bytes: int
    fault: str | None


def read_checkpoints(run: RunDir, check: Callable[[Path], None]) -> list[Checkpoint]:
    """The run's checkpoints, oldest first. `check` raises CheckpointError for one that is not whole."""
    found = []
    for path in sorted(run.checkpoints.glob("step_????????")):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        try:
            check(path)
        except CheckpointError as error:
            found.append(Checkpoint(path.name, size, str(error)))
        else:
            found.append(Checkpoint(path.name, size, None))
    return found


def check_sizes(path: Path) -> None:
    """Quickly: every file of the manifest is there with its size; what is in it is not read."""
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        sizes = {Path(name).name: expected["bytes"] for name, expected in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} has no readable manifest") from None
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{file} does not have the size its manifest says")
