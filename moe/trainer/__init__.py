"""The trainer: one loop, its evaluation, and how it stops."""

from moe.trainer.entry import main, train

__all__ = ["main", "train"]
