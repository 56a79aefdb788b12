"""The training loop, read top to bottom.

A step: its batch is a pure function of (seed, step); micro-batches pass forward and backward, their loss weighted so
that gradients are those of the whole global batch's mean; gradients are clipped; AdamW steps; the balancer moves the
expert biases. Balance losses and multi-token prediction's are added for the backward only: train/loss is cross-entropy
alone.
The meter is told at each turn what the process is doing, and never waits for a GPU.
"""

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe.balancer import Balancer, Load
from moe.checkpoint import prune, save_checkpoint
from moe.config import Recipe
from moe.data import Sequences, TokenData
from moe.data.sequences import document_ids
from moe.errors import TrainingError
from moe.model import Transformer
from moe.optim import learning_rate, set_learning_rate
from moe.parallel import ranks
from moe.parallel.engine import Engine
from moe.rundir import RunDir
from moe.tracking import Tracking
from moe.trainer.evaluate import evaluate
from moe.trainer.metering import Cost, TrainingMeter
from moe.trainer.signals import StopRequest

__all__ = ["Loop", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a loop ended. `reason`: complete, budget, or the name of a signal. `metrics`: the last evaluation."""

    step: int
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)


class Loop:
    """Everything a step needs, and the steps. The parts are made by `moe.trainer.train`."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        engine: Engine,
        model: Transformer,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        balancer: Balancer,
        data: TokenData,
        meter: TrainingMeter,
        tracking: Tracking,
        stop: StopRequest,
    ) -> None:
        self.recipe, self.run, self.engine = recipe, run, engine
        self.model, self.wrapped, self.optimizer, self.balancer = model, wrapped, optimizer, balancer
        self.meter, self.tracking, self.stop = meter, tracking, stop
        self.facts = data.facts
        self.end_token = data.end_token if recipe.data.mask_documents else None
        train = recipe.train
        self.train_sequences = Sequences(data.train, train.seq_len, recipe.run.seed)
        self.eval_sequences = Sequences(data.validation, train.seq_len, None)
        if len(self.eval_sequences) < engine.ranks:
            train.fail("seq_len", f"leaves {len(self.eval_sequences)} validation sequences for {engine.ranks} ranks")
        self._totals_before: Tensor | None = None  # the step before's totals
        self._last_step: tuple[Tensor, Tensor] | None = None  # the last step's totals and gradient norm
        self.accumulation = train.accumulation(engine.ranks)
        self.micro_batch = train.global_batch_size // (engine.ranks * self.accumulation)
        self.tokens_per_step = train.global_batch_size * train.seq_len

    def steps(self, first: int) -> Outcome:
        """Train from step `first` to the end, a budget, or a signal; always ends in a checkpoint."""
        train = self.recipe.train
        bar = tqdm(
            total=train.max_steps, initial=first, unit="step", desc=self.recipe.run.name,
            disable=not ranks.is_first(), mininterval=0.5 if sys.stderr.isatty() else 15, dynamic_ncols=True,
        )  # fmt: skip
        with bar:
            return self._steps(first, bar)

    def _steps(self, first: int, progress: tqdm) -> Outcome:
        train = self.recipe.train
        step, reason, metrics = first, "complete", {}
        rate = _Rate(self.tokens_per_step, first)
        if first == 0:
            metrics = self._evaluate(0)
        while step < train.max_steps and reason == "complete":
            rate.start()
            totals, norm, load = self._step(step)
            step += 1
            self.meter.progress(step, step * self.tokens_per_step)
            logged = step % train.log_every_steps == 0 or step == train.max_steps
            if logged:
                loss, *added, _ = totals.tolist()
                cost = self.meter.cost()
                self._log(step, loss, added, norm, load, cost, rate.stop(step))
                progress.set_postfix_str(_postfix(loss, metrics, cost), refresh=False)
                if _spent(cost, train.max_kwh, train.max_device_hours):
                    reason = "budget"
            else:
                rate.pause()
            progress.update()
            if self._asked_to_stop(totals):
                reason = self.stop.signal.name if self.stop.signal else "SIGTERM"
            done = step == train.max_steps or reason != "complete"
            if self._evaluation_due(step) or (done and reason in ("complete", "budget")):
                metrics = self._evaluate(step)
            if step % train.checkpoint_every_steps == 0 or done:
                self._save(step)
        return Outcome(step, reason, metrics)

    def _step(self, step: int) -> tuple[Tensor, Tensor, Load]:
        """One optimizer step.

        Returns four totals over the ranks in one tensor (the global batch's loss, its balance loss, multi-token
        prediction's, how many ranks were asked to stop), the gradient's norm, and the experts' load.
        """
        self.meter.phase("data")
        batch = self.recipe.train.global_batch_size
        mine = step * batch + ranks.rank() * self.micro_batch * self.accumulation
        batches = [
            self.train_sequences.batch(mine + number * self.micro_batch, self.micro_batch)
            for number in range(self.accumulation)
        ]
        # packed sequences have a next token everywhere but at their end, so every micro-batch weighs the same
        weight = 1 / (self.engine.ranks * self.accumulation)

        self.meter.phase("forward_backward")
        totals = torch.zeros(4, device=self.engine.device)
        totals[3] = float(bool(self.stop))
        for number, cpu_ids in enumerate(batches):
            ids = self.engine.to_device(cpu_ids)
            with self.engine.accumulate(self.wrapped, last=number == self.accumulation - 1):
                documents = None if self.end_token is None else document_ids(ids, self.end_token)
                with self.engine.autocast():
                    out = self.wrapped(ids, labels=ids, document_ids=documents)
                none = out.loss.new_zeros(())
                balance_loss = none if out.balance_loss is None else out.balance_loss
                mtp_loss = none if out.mtp_loss is None else out.mtp_loss
                objective = out.loss + balance_loss + self.recipe.train.mtp_loss_weight * mtp_loss
                # DistributedDataParallel averages gradients over ranks, so a rank's own weight leaves them out
                (objective / self.accumulation).backward()
            totals[:3] += torch.stack((out.loss.detach(), balance_loss.detach(), mtp_loss.detach())) * weight

        self.meter.phase("optimizer")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.grad_clip)
        set_learning_rate(self.optimizer, learning_rate(self.recipe.optim, step, self.recipe.train.max_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        load = self.balancer.step()
        self._last_step = ranks.all_reduce_sum(totals), norm
        return totals, norm, load

    def _asked_to_stop(self, totals: Tensor) -> bool:
        """Whether any rank got a signal. Several ranks agree on it one step late, when no GPU is waited for."""
        if self.engine.ranks == 1:
            return bool(self.stop)
        before, self._totals_before = self._totals_before, totals
        return before is not None and float(before[3]) > 0

    def _log(
        self, step: int, loss: float, added: list[float], norm: Tensor, load: Load, cost: Cost, rate: float
    ) -> None:
        """Write a metrics row; `added`: balance loss and multi-token prediction's.

        Raises TrainingError when loss or gradient are not finite.
        """
        self._check_finite(step)
        row: dict[str, Any] = {
            "train/step": step,
            "train/tokens": step * self.tokens_per_step,
            "train/loss": loss,
            "train/grad_norm": float(norm),
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/device_hours": cost.device_hours,
            "energy/total_kwh": cost.kwh,
            "energy/power_w": cost.power_w,
            "efficiency/tokens_per_s": rate,
        }
        if self.recipe.balance.has_losses and self.recipe.model.is_moe:
            row["train/balance_loss"] = added[0]
        if self.recipe.model.num_nextn_predict_layers:
            row["train/mtp_loss"] = added[1]
        row |= load.metrics() | self.balancer.bias_metrics()
        self.tracking.log(row)

    def _check_finite(self, step: int) -> None:
        """Before anything of the last step is written down: NaN weights must not become the newest checkpoint."""
        if self._last_step is None:
            return
        loss, norm = float(self._last_step[0][0]), float(self._last_step[1])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"train/loss is {loss} and train/grad_norm is {norm} at step {step}; every checkpoint in "
                f"{self.run.checkpoints} is of before: train.resume one of them, or start a new run.name, with a lower "
                "optim.lr"
            )

    def _evaluation_due(self, step: int) -> bool:
        every = self.recipe.train.eval_every_tokens
        return step * self.tokens_per_step // every > (step - 1) * self.tokens_per_step // every

    def _evaluate(self, step: int) -> dict[str, float]:
        self.meter.phase("evaluation")
        wanted = self.recipe.train.eval_sequences or len(self.eval_sequences)
        metrics = evaluate(
            self.model,
            self.engine,
            self.eval_sequences,
            self.facts,
            count=min(max(wanted, self.engine.ranks), len(self.eval_sequences)),
            batch_size=self.micro_batch,
            end_token=self.end_token,
        )
        # the row's clock is what `moe compare` looks up in the ledger: a loss costs its measuring too
        self.tracking.log({"train/step": step, "train/tokens": step * self.tokens_per_step, **metrics})
        return metrics

    def _save(self, step: int) -> None:
        self._check_finite(step)
        self.meter.phase("checkpoint")
        tokens = step * self.tokens_per_step
        ledger = self.meter.flush(step, tokens)
        self.tracking.sync()
        if ranks.is_first():
            save_checkpoint(
                self.run.checkpoints, step, self.model, self.optimizer, {"tokens": tokens, "ledger": ledger}
            )
            prune(self.run.checkpoints, self.recipe.train.keep_checkpoints)
        ranks.barrier()


class _Rate:
    """Tokens per second of steps alone: evaluation and checkpoints lie between `stop` or `pause` and `start`."""

    def __init__(self, tokens_per_step: int, first_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._spent_s, self._began = 0.0, 0.0
        self._logged_step = first_step

    def start(self) -> None:
        self._began = time.monotonic()

    def pause(self) -> None:
        self._spent_s += time.monotonic() - self._began

    def stop(self, step: int) -> float:
        """End a logged step and return the rate since the last one."""
        self.pause()
        rate = (step - self._logged_step) * self._tokens_per_step / max(self._spent_s, 1e-9)
        self._spent_s, self._logged_step = 0.0, step
        return rate


def _spent(cost: Cost, max_kwh: float | None, max_device_hours: float | None) -> bool:
    return (max_kwh is not None and cost.kwh >= max_kwh) or (
        max_device_hours is not None and cost.device_hours >= max_device_hours
    )


def _postfix(loss: float, metrics: dict[str, float], cost: Cost) -> str:
    parts = [f"loss {loss:.3f}"]
    if "eval/loss" in metrics:
        parts.append(f"eval {metrics['eval/loss']:.3f}")
    if "eval/max_vio" in metrics:
        parts.append(f"MaxVio {metrics['eval/max_vio']:.2f}")
    parts.append(f"{cost.kwh * 1000:.2f} Wh")
    return ", ".join(parts)
