"""The checkpoint folder on disk: written whole, verified by its manifest, listed and pruned."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe.checkpoint.snapshot import Snapshot, restore_optimizer, restore_random
from moe.errors import CheckpointError
from moe.model import Transformer, write_pretrained
from moe.rundir import write_json

__all__ = [
    "list_checkpoints",
    "load_checkpoint",
    "newest_whole",
    "prune",
    "read_state",
    "step_of",
    "verify",
    "write_checkpoint",
]


def write_checkpoint(folder: Path, step: int, snapshot: Snapshot) -> Path:
    """Write `folder/step_NNNNNNNN` and return it.

    Raises CheckpointError when the disk refuses; earlier checkpoints are untouched then.
    """
    final = folder / f"step_{step:08d}"
    aside, replaced = (folder / f".step_{step:08d}.{os.getpid()}{suffix}" for suffix in ("", ".replaced"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_pretrained(aside, snapshot.config, snapshot.weights)
        save_file(snapshot.optimizer, aside / "optimizer.safetensors")
        save_file(snapshot.random, aside / "random.safetensors")
        write_json(aside / "state.json", {**snapshot.state, "step": step})
        _sync_files(aside)
        manifest = {path.name: _fingerprint(path) for path in sorted(aside.iterdir())}
        write_json(aside / "manifest.json", {"version": 1, "files": manifest})
        _sync_folder(aside)
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync_folder(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{final} cannot be written ({reason}); earlier checkpoints are whole") from None
    return final


def load_checkpoint(
    path: Path, model: Transformer, optimizer: torch.optim.Optimizer, *, optimizer_tensors: bool = True
) -> dict[str, Any]:
    """Put a verified checkpoint into model, optimizer and random generators, and return its stored state.

    Without `optimizer_tensors` the optimizer gets its settings only; the caller reads optimizer.safetensors in parts.
    """
    model.load_weights(path)
    state = read_state(path)
    tensors = load_file(path / "optimizer.safetensors") if optimizer_tensors else {}
    restore_optimizer(model, optimizer, tensors, state["param_groups"])
    restore_random(load_file(path / "random.safetensors"))
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and SHA-256."""
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{path} has no readable manifest; use another checkpoint") from None
    for name, expected in files.items():
        file = path / Path(name).name
        try:
            found = _fingerprint(file) if file.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); mend that or use another") from None
        if found != expected:
            raise CheckpointError(f"{file} does not match its manifest; use another checkpoint")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by step, oldest first."""
    return sorted(folder.glob("step_????????"))


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, or None, and one sentence for each newer one that does not."""
    complaints = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def prune(folder: Path, keep: int, keep_every_steps: int | None = None) -> None:
    """Delete all but the `keep` newest checkpoints and those of steps divisible by `keep_every_steps`.

    What interrupted saves left behind goes too.
    """
    for path in list_checkpoints(folder)[:-keep]:
        if not (keep_every_steps and step_of(path) % keep_every_steps == 0):
            path.rename(folder / f".{path.name}.pruned")  # at once: nobody finds a checkpoint that is half there
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step a checkpoint folder is named after."""
    return int(path.name.removeprefix("step_"))


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
