"""Checkpoints: what a run is at one step, and the folder on disk that holds it, whole or not there.

    checkpoints/step_00000200/
      model.safetensors, config.json     loadable by Transformer.from_pretrained
      optimizer.safetensors              PARAMETER/exp_avg …: state tensors under the parameter's name
      random.safetensors                 states of the random generators
      state.json                         step, tokens, optimizer settings, ledger position
      manifest.json                      size and SHA-256 of every file above; written last

A checkpoint is written aside, fsynced, and renamed into place. Reading verifies the manifest first.
"""

from moe.checkpoint.files import (
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    read_state,
    step_of,
    verify,
    write_checkpoint,
)
from moe.checkpoint.saver import Saver
from moe.checkpoint.snapshot import Snapshot, capture, random_states

__all__ = [
    "Saver",
    "Snapshot",
    "capture",
    "list_checkpoints",
    "load_checkpoint",
    "newest_whole",
    "random_states",
    "read_state",
    "step_of",
    "verify",
    "write_checkpoint",
]
