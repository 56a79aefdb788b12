"""Runs as their directories show them: how each stands, what it holds, and a living one as it goes. Needs no torch."""

from moe.runs.checkpoints import Checkpoint, read_checkpoints
from moe.runs.details import RunDetails, read_details
from moe.runs.follow import Follower
from moe.runs.status import RunStatus, list_runs, read_status

__all__ = [
    "Checkpoint",
    "Follower",
    "RunDetails",
    "RunStatus",
    "list_runs",
    "read_checkpoints",
    "read_details",
    "read_status",
]
