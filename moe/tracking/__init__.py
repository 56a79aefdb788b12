"""Where metrics go: metrics.jsonl always, and the trackers the recipe asks for, opened by rank 0 alone."""

from moe.tracking.rebuild import rebuild
from moe.tracking.tracking import Tracking

__all__ = ["Tracking", "rebuild"]
