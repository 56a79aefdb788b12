"""One optimizer step: forward and backward over the micro-batches, clipping, the update, the expert biases."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.balancer import Balancer, Load
from moe.config import Recipe
from moe.data.sequences import document_ids
from moe.errors import TrainingError
from moe.model import Transformer
from moe.optim import set_learning_rate
from moe.parallel import ranks
from moe.parallel.engine import Engine
from moe.schedule import learning_rate
from moe.trainer.breakdown import Breakdown
from moe.trainer.hooks import Hooks
from moe.trainer.metering import TrainingMeter
from moe.trainer.spikes import SpikeGuard

__all__ = ["StepResult", "Stepper"]


@dataclass(frozen=True)
class StepResult:
    """What a step found. Tensors stay on the device: whoever reads them waits for it.

    means: what the objective logged, by name in `names`, averaged over the global batch; then how many ranks were asked
        to stop.
    norm: norm of the global batch's gradient before clipping.
    refused: why the update was not made, or None.
    """

    names: tuple[str, ...]
    means: Tensor
    norm: Tensor
    load: Load
    refused: str | None = None

    def logged(self) -> dict[str, float]:
        """The objective's numbers by name; waits for the device."""
        return dict(zip(self.names, self.means.tolist(), strict=False))

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop before this step; waits for the device."""
        return float(self.means[-1]) > 0


class Stepper:
    """Makes optimizer steps. With a `guard` each waits for the device before its update, to look at loss and norm."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        balancer: Balancer,
        hooks: Hooks,
        meter: TrainingMeter,
        guard: SpikeGuard | None,
        breakdown: Breakdown,
        end_token: int | None,
    ) -> None:
        self._recipe, self._engine, self._model, self._hooks = recipe, engine, model, hooks
        self._optimizer, self._balancer, self._guard = optimizer, balancer, guard
        self._meter, self._breakdown = meter, breakdown
        self._end_token = end_token
        self._wrapped: nn.Module = engine.prepare(model, optimizer)

    def step(self, step: int, micro_batches: Sequence[Tensor], *, stop: bool) -> StepResult:
        """Step number `step`, from 0, on (B, S) token ids in CPU memory; `stop`: this rank was asked to stop."""
        self._meter.phase("forward_backward")
        names, means = self._backward(micro_batches)
        self._breakdown.switch("communication")
        means = ranks.all_reduce_sum(torch.cat((means, means.new_tensor([float(stop)]))))

        self._meter.phase("optimizer")
        self._breakdown.switch("optimizer")
        norm = self._engine.clip(self._model, self._recipe.optim.grad_clip)
        refused = self._complaint(float(means[names.index("train/loss")]), norm) if self._guard else None
        if refused:
            self._engine.drop(self._optimizer)
            self._balancer.skip()
            return StepResult(names, means, norm, Load({}), refused)
        set_learning_rate(self._optimizer, learning_rate(self._recipe.optim, step, self._recipe.train.max_steps))
        self._engine.update(self._optimizer)
        return StepResult(names, means, norm, self._balancer.step())

    def _backward(self, micro_batches: Sequence[Tensor]) -> tuple[tuple[str, ...], Tensor]:
        """Gradients of the global batch's mean objective; returns the rank's share of the means of what was logged."""
        number = len(micro_batches)
        shares = []
        for position, cpu_ids in enumerate(micro_batches):
            ids = self._engine.to_device(cpu_ids)
            documents = None if self._end_token is None else document_ids(ids, self._end_token)
            with self._engine.accumulate(self._wrapped, last=position == number - 1):
                with self._engine.autocast():
                    objective = self._hooks.objective(self._recipe, self._wrapped, ids, documents)
                # packed sequences have a next token everywhere but at their end, so every micro-batch weighs the same,
                # and gradients are averaged over ranks, so a rank's own weight leaves those out
                self._engine.backward(objective.minimised / number)
            shares.append(torch.stack([value.detach().float() for value in objective.logged.values()]))
        if "train/loss" not in objective.logged:
            raise TrainingError(
                f"{type(self._hooks).__name__}.objective logs {', '.join(objective.logged) or 'nothing'} but no "
                "train/loss, which the run is watched by; add it"
            )
        return tuple(objective.logged), torch.stack(shares).sum(0) / (number * self._engine.ranks)

    def _complaint(self, loss: float, norm: Tensor) -> str | None:
        """What the guard says, the same on every rank."""
        assert self._guard is not None
        complaint = self._guard.complaint(loss, float(norm))
        anywhere = ranks.sum_numbers([float(complaint is not None)], self._engine.device)[0]
        return complaint or ("another rank saw a spike" if anywhere else None)
