"""What a recipe may do its own way without a loop of its own: the objective, the data, further evaluation.

class Mine(Hooks):
    def objective(self, recipe, model, input_ids, document_ids):
        usual = super().objective(recipe, model, input_ids, document_ids)
        ...

main(RECIPE, hooks=Mine())
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moe.config import Recipe
from moe.data import Sampling, TrainingData

__all__ = ["Hooks", "Objective"]


@dataclass(frozen=True)
class Objective:
    """What a micro-batch is to lower, and what is written down of it.

    `minimised` is a scalar with a gradient, a mean over the micro-batch: micro-batches and ranks are averaged.
    `logged` holds scalars by metric name, the same names every time, averaged likewise; `train/loss` must be among them
    and, for runs to be comparable, must be next-token cross-entropy alone.
    """

    minimised: Tensor
    logged: dict[str, Tensor]


class Hooks:
    """Subclass and override. Every method is called on every rank, and must do the same collectives on each."""

    def objective(self, recipe: Recipe, model: nn.Module, input_ids: Tensor, document_ids: Tensor | None) -> Objective:
        """Forward pass over one micro-batch, (B, S) token ids on the device, in the precision of the recipe.

        Call `model` itself, which may be wrapped for several ranks, and call it once.
        """
        out = model(input_ids, labels=input_ids, document_ids=document_ids)
        minimised, logged = out.loss, {"train/loss": out.loss}
        if out.balance_loss is not None:
            minimised = minimised + out.balance_loss
            logged["train/balance_loss"] = out.balance_loss
        if out.mtp_loss is not None:
            minimised = minimised + recipe.train.mtp_loss_weight * out.mtp_loss
            logged["train/mtp_loss"] = out.mtp_loss
        return Objective(minimised, logged)

    def data(self, recipe: Recipe, sampling: Sampling) -> TrainingData | None:
        """Sequences of one's own, such as `moe.data.data_from_tokens` makes; None for what `data.source` names.

        `sampling` holds sequence length, seed, and this rank among the ranks. The same call must give the same data
        when a run goes on: the facts' hashes are compared.
        """
        return None

    def evaluate(self, recipe: Recipe, model: nn.Module, step: int) -> dict[str, float]:
        """Further numbers `eval/…` for the row of each evaluation; the model is in training mode, gradients are on."""
        return {}
