"""Runs as their directories show them: how each stands, what it holds, and a living one as it goes. Needs no torch."""

from moe.runs.checkpoints import Checkpoint, read_checkpoints
from moe.runs.components import Components, read_components
from moe.runs.details import RunDetails, read_details
from moe.runs.follow import Follower
from moe.runs.status import RunStatus, list_runs, read_status

__all__ = [
    "Checkpoint",
    "Components",
    "Follower",
    "RunDetails",
    "RunStatus",
    "list_runs",
    "read_checkpoints",
    "read_components",
    "read_details",
    "read_status",
]
