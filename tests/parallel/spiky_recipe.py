"""The tiny recipe, whose gradient is not a number once: in the second micro-batch of the fourth step of a process."""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainer"))
from tiny_recipe import RECIPE

from moe.config import Recipe
from moe.trainer import Hooks, Objective, main


class Spiky(Hooks):
    """Two micro-batches a step: the eighth objective is the spike, before and after a rollback counted on."""

    passes = 0

    def objective(self, recipe: Recipe, model: nn.Module, input_ids: Tensor, document_ids: Tensor | None) -> Objective:
        usual = super().objective(recipe, model, input_ids, document_ids)
        self.passes += 1
        return dataclasses.replace(usual, minimised=usual.minimised * torch.nan) if self.passes == 8 else usual


if __name__ == "__main__":
    main(RECIPE, hooks=Spiky())
