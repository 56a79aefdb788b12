"""The trainer: one loop, its evaluation, and how it stops."""

from moe.trainer.entry import main, train
from moe.trainer.hooks import Hooks, Objective

__all__ = ["Hooks", "Objective", "main", "train"]
