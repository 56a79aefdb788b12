"""The tiny recipe with hooks that misbehave on demand, so that what the trainer does about it can be watched.

POISON=n          the n-th objective of this process is not finite
SPIKE=n           the n-th objective of this process is a hundred times as large
STARVE=n          from the n-th on, this process may not allocate more memory
KILL=n            the n-th objective of this process is its end, as by kill -9
SEEN=file         one line an objective: the sum of its token ids
TOKENS=n          data of its own: multiples of n
FIRST=name         a number of this name before the loss
LOSSLESS=1         no loss among what is logged
SMOOTH=1          another objective, and a number of its own in each evaluation
"""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import torch
from tiny_recipe import RECIPE
from torch import Tensor, nn

from moe.config import Recipe
from moe.data import Sampling, TrainingData, data_from_tokens
from moe.trainer import Hooks, Objective, main


class Misbehaving(Hooks):
    def __init__(self) -> None:
        self.calls = 0

    def objective(self, recipe: Recipe, model: nn.Module, input_ids: Tensor, document_ids: Tensor | None) -> Objective:
        self.calls += 1
        if "SEEN" in os.environ:
            with Path(os.environ["SEEN"]).open("a") as file:
                file.write(f"{int(input_ids.sum())}\n")
        if self._now("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._now("STARVE"):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
            input_ids = input_ids.repeat(64, 1)
        usual = super().objective(recipe, model, input_ids, document_ids)
        if "FIRST" in os.environ:
            usual = Objective(usual.minimised, {os.environ["FIRST"]: usual.minimised * 0, **usual.logged})
        if "LOSSLESS" in os.environ:
            return Objective(usual.minimised, {"train/penalty": usual.minimised})
        for word, factor in (("POISON", torch.nan), ("SPIKE", 100.0)):
            if self._now(word):
                return Objective(usual.minimised * factor, {name: v * factor for name, v in usual.logged.items()})
        if "SMOOTH" in os.environ:
            penalty = model.lm_head.weight.square().mean()
            return Objective(usual.minimised + penalty, {**usual.logged, "train/penalty": penalty})
        return usual

    def data(self, recipe: Recipe, sampling: Sampling) -> TrainingData | None:
        if "TOKENS" not in os.environ:
            return None
        counting = np.arange(5000) * int(os.environ["TOKENS"]) % 300
        return data_from_tokens(
            "counting", counting[:4000], counting[4000:], sampling, vocab_size=300, end_token=0, validation_bytes=1000
        )

    def evaluate(self, recipe: Recipe, model: nn.Module, step: int) -> dict[str, float]:
        if "SMOOTH" not in os.environ:
            return {}
        return {"eval/head_norm": float(model.lm_head.weight.norm())}

    def _now(self, word: str) -> bool:
        return self.calls in map(int, filter(None, os.environ.get(word, "").split(",")))


if __name__ == "__main__":
    main(RECIPE, hooks=Misbehaving())
