"""Checkpoints: safetensors and JSON in a folder that is either whole or not there.

    checkpoints/step_00000200/
      model.safetensors, config.json     loadable by Transformer.from_pretrained
      optimizer.safetensors              PARAMETER/exp_avg …: state tensors under the parameter's name
      random.safetensors                 states of the random generators
      state.json                         step, tokens, optimizer settings, ledger position
      manifest.json                      size and SHA-256 of every file above; written last

A checkpoint is written aside, fsynced, and renamed into place. Reading verifies the manifest first.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.errors import CheckpointError
from moe.model import Transformer
from moe.rundir import write_json

__all__ = ["list_checkpoints", "load_checkpoint", "newest_whole", "prune", "read_state", "save_checkpoint", "verify"]


def save_checkpoint(
    folder: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> Path:
    """Write `folder/step_NNNNNNNN` and return it. `state` is JSON; it is read back by `read_state`.

    Raises CheckpointError when the disk refuses; earlier checkpoints are untouched then.
    """
    final = folder / f"step_{step:08d}"
    aside = folder / f".step_{step:08d}.{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        save_file(_optimizer_tensors(optimizer, names), aside / "optimizer.safetensors")
        save_file(_random_states(), aside / "random.safetensors")
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [names[id(p)] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        write_json(aside / "state.json", {**state, "step": step, "param_groups": groups})
        _sync_files(aside)
        manifest = {path.name: _fingerprint(path) for path in sorted(aside.iterdir())}
        write_json(aside / "manifest.json", {"version": 1, "files": manifest})
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{final} cannot be written ({reason}); earlier checkpoints are whole") from None
    return final


def load_checkpoint(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model, optimizer and random generators of a verified checkpoint, and return the stored state."""
    model.load_weights(path)
    state = read_state(path)
    tensors = load_file(path / "optimizer.safetensors")
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        by_parameter.setdefault(name, {})[field] = tensor
    for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in stored.items() if key != "params"})
    for name, parameter in model.named_parameters():
        if name in by_parameter:
            optimizer.state[parameter] = {
                field: tensor if field == "step" and not parameter.is_cuda else tensor.to(parameter.device)
                for field, tensor in by_parameter[name].items()
            }
    _restore_random(load_file(path / "random.safetensors"))
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
        if not file.is_file() or _fingerprint(file) != expected:
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


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what interrupted saves left behind."""
    for path in [*list_checkpoints(folder)[:-keep], *folder.glob(".step_*")]:
        shutil.rmtree(path, ignore_errors=True)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    return {
        f"{names[id(parameter)]}/{field}": value.detach().contiguous()
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
        if isinstance(value, Tensor)
    }


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


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
