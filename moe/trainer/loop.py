"""The training loop, read top to bottom.

Each turn: the step's batches, which are a pure function of (seed, step); one optimizer step (`moe.trainer.step`); a
metrics row; then, when due, an evaluation and a checkpoint. The meter is told at each turn what the process is doing,
and never waits for a GPU.
"""

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from moe.balancer import Balancer
from moe.checkpoint import Saver, newest_whole, step_of
from moe.config import Recipe
from moe.data import TrainingData
from moe.errors import TrainingError
from moe.model import Transformer
from moe.parallel import ranks
from moe.parallel.engine import Engine
from moe.rundir import RunDir
from moe.tracking import Tracking
from moe.trainer import memory
from moe.trainer.batches import Batches
from moe.trainer.breakdown import Breakdown
from moe.trainer.evaluate import evaluate
from moe.trainer.hooks import Hooks
from moe.trainer.metering import Cost, TrainingMeter
from moe.trainer.profile import Profile
from moe.trainer.rollback import PassedOver
from moe.trainer.signals import StopRequest
from moe.trainer.spikes import SpikeGuard
from moe.trainer.step import Stepper, StepResult
from moe.trainer.telemetry import Telemetry

__all__ = ["Loop", "Outcome"]

_MOST_SKIPS = 10  # in a row: the fault is then not in the batch


@dataclass(frozen=True)
class Outcome:
    """How a loop ended. `reason`: complete, budget, rollback, or the name of a signal. `metrics`: the last evaluation.

    After a rollback the run is to be started again from its newest checkpoint.
    """

    step: int
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)


class Loop:
    """Everything a step needs, and the steps. The parts are made by `moe.trainer.train`.

    Args:
        state: what the checkpoint of step `first_step` stored, or nothing.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        engine: Engine,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        balancer: Balancer,
        data: TrainingData,
        hooks: Hooks,
        meter: TrainingMeter,
        tracking: Tracking,
        stop: StopRequest,
        *,
        first_step: int,
        state: dict[str, Any],
    ) -> None:
        train = recipe.train
        self.recipe, self.run, self.engine, self.hooks = recipe, run, engine, hooks
        self.model, self.optimizer, self.balancer = model, optimizer, balancer
        self.meter, self.tracking, self.stop = meter, tracking, stop
        self.first_step = first_step
        self.micro_batch = train.micro_batch(engine.ranks)
        self.tokens_per_step = train.global_batch_size * train.seq_len

        self.facts = data.facts
        self.end_token = data.end_token if recipe.data.mask_documents else None
        self.eval_sequences = data.validation
        if len(self.eval_sequences) < engine.ranks:
            train.fail("seq_len", f"leaves {len(self.eval_sequences)} validation sequences for {engine.ranks} ranks")
        self.passed_over = PassedOver(run)
        self.batches = Batches(
            data.train,
            self.passed_over,
            sequential=recipe.data.streaming,
            global_batch_size=train.global_batch_size,
            micro_batch_size=self.micro_batch,
            accumulation=train.accumulation(engine.ranks),
        )
        self.batches.restore(state.get("data", []), first_step)

        watched = train.on_spike != "stop" or train.spike_sigmas is not None
        self.guard = SpikeGuard(train.spike_sigmas, state.get("recent_steps", ())) if watched else None
        self.skipped_in_a_row = 0
        self.breakdown = Breakdown(model, engine.device, ranks=engine.ranks, inside=not train.compile)
        self.stepper = Stepper(
            recipe, engine, model, optimizer, balancer, hooks, meter, self.guard, self.breakdown, self.end_token
        )
        self.telemetry = Telemetry(recipe, engine.device, engine.ranks, self.breakdown, first_step=first_step)
        self.profile = Profile(run.profile, train.profile_at_step)
        self.saver = Saver(
            run.checkpoints,
            keep=train.keep_checkpoints,
            keep_every_steps=train.keep_every_steps,
            background=train.background_checkpoints,
        )
        self._last: StepResult | None = None
        self._before_last: StepResult | None = None

    def steps(self) -> Outcome:
        """Train to the end, a budget, a signal or a rollback; always ends in a checkpoint, but for the last.

        Raises TrainingError when training cannot go on: what was saved before is whole then.
        """
        train = self.recipe.train
        bar = tqdm(
            total=train.max_steps, initial=self.first_step, unit="step", desc=self.recipe.run.name,
            disable=not ranks.is_first(), mininterval=0.5 if sys.stderr.isatty() else 15, dynamic_ncols=True,
        )  # fmt: skip
        try:
            with bar:
                return self._steps(bar)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            at = bar.n + 1
            raise TrainingError(memory.explain(self.recipe, self.micro_batch, at, self.engine.device)) from None
        finally:
            self.profile.close()
            self.batches.close()
            self.saver.close()

    def _steps(self, progress: tqdm) -> Outcome:
        train = self.recipe.train
        step, reason, metrics = self.first_step, "complete", {}
        over = self._already_over()
        if over:
            return Outcome(step, over)
        if step == 0:
            metrics = self._evaluate(0)
        while step < train.max_steps and reason == "complete":
            self.telemetry.start()
            wanted = (step + 1) % train.breakdown_every_steps == 0
            with self.profile.step(step + 1), self.breakdown.measured(wanted):
                result = self._step(step)
            if not result.refused:
                self.skipped_in_a_row = 0
            elif self._refuse(step, result) == "rollback":
                return Outcome(step, "rollback")
            step += 1
            self.batches.accept()
            self.meter.progress(step, step * self.tokens_per_step)
            if step % train.log_every_steps == 0 or step == train.max_steps:
                cost = self.meter.cost()
                self._log(step, result, cost)
                progress.set_postfix_str(_postfix(result.logged()["train/loss"], metrics, cost), refresh=False)
                if cost.reaches_budget(self.recipe) and step < train.max_steps:
                    reason = "budget"
            else:
                self.telemetry.pause()
            progress.update()
            if self._asked_to_stop(result):
                reason = self.stop.signal.name if self.stop.signal else "SIGTERM"
            done = step == train.max_steps or reason != "complete"
            if reason in ("complete", "budget") and (done or self._evaluation_due(step)):
                metrics = self._evaluate(step)
            if step % train.checkpoint_every_steps == 0 or done:
                self._save(step)
        self.saver.wait()
        ranks.barrier()
        return Outcome(step, reason, metrics)

    def _step(self, step: int) -> StepResult:
        self.meter.phase("data")
        self.breakdown.switch("data")
        micro_batches = self.batches.take(step)
        self.breakdown.switch("other")
        result = self.stepper.step(step, micro_batches, stop=bool(self.stop))
        self._before_last, self._last = self._last, result
        return result

    def _refuse(self, step: int, result: StepResult) -> str:
        """The guard refused the update of step `step` + 1: do as `train.on_spike` says, and name step and batch."""
        train = self.recipe.train
        cause = f"{result.refused} at step {step + 1} ({self.batches.sequences(step)})"
        if train.on_spike == "stop":
            if step > self.first_step:  # else it is the checkpoint the run went on from, or the weights it began with
                self._save(step)
                self.saver.wait()
            raise TrainingError(
                f"{cause}; the update was not made{f' and step {step} is saved' if step else ''}: "
                "go on with train.on_spike=skip or rollback, or a larger train.spike_sigmas"
            )
        self.skipped_in_a_row += 1
        if train.on_spike == "skip":
            if self.skipped_in_a_row > _MOST_SKIPS:
                raise TrainingError(
                    f"{cause}, the {self.skipped_in_a_row}th in a row: the weights must be at fault, not the batch; "
                    "go on with train.on_spike=rollback, or start a new run.name with a lower optim.lr"
                )
            ranks.say(f"skipped: {cause}")
            return "skip"
        self.saver.wait()
        ranks.barrier()
        newest, _ = newest_whole(self.run.checkpoints)
        back_to = step_of(newest) if newest else 0
        self.passed_over.roll_back(back_to, step + 1, cause)
        ranks.say(f"rolled back to step {back_to}: {cause}")
        return "rollback"

    def _asked_to_stop(self, result: StepResult) -> bool:
        """Whether any rank got a signal. Several ranks agree on it one step late, when no GPU is waited for."""
        if self.engine.ranks == 1:
            return bool(self.stop)
        return self._before_last is not None and self._before_last.asked_to_stop()

    def _already_over(self) -> str | None:
        """A signal that came while text was read, on any rank; or "budget", for a run that goes on with none left."""
        spent = self.first_step > 0 and self.meter.cost().reaches_budget(self.recipe)
        stopped, spent_anywhere = ranks.sum_numbers([float(bool(self.stop)), float(spent)], self.engine.device)
        if stopped:
            return self.stop.signal.name if self.stop.signal else "SIGTERM"
        return "budget" if spent_anywhere else None

    def _log(self, step: int, result: StepResult, cost: Cost) -> None:
        """Write a metrics row. Raises TrainingError when loss or gradient are not finite."""
        row: dict[str, Any] = {"train/step": step, "train/tokens": step * self.tokens_per_step}
        if result.refused:
            row["train/skipped_in_a_row"] = self.skipped_in_a_row
        else:
            self._check_finite(step)
            row |= result.logged()
            row |= {"train/grad_norm": float(result.norm), "train/lr": self.optimizer.param_groups[0]["lr"]}
            row |= result.load.metrics() | self.balancer.bias_metrics()
        row |= cost.row(self.recipe.energy)
        row["energy/power_w"] = cost.power_w
        row |= self.telemetry.stop(step)
        row["efficiency/data_wait_s"] = self.batches.waited_s()
        self.tracking.log(row)

    def _check_finite(self, step: int) -> None:
        """Before anything of the last step is written down: NaN weights must not become the newest checkpoint."""
        if self._last is None or self._last.refused:
            return
        loss, norm = self._last.logged()["train/loss"], float(self._last.norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"train/loss is {loss} and train/grad_norm is {norm} at step {step} "
                f"({self.batches.sequences(step - 1)}); every checkpoint in {self.run.checkpoints} is of before: "
                "go on with train.on_spike=skip or rollback, or start a new run.name with a lower optim.lr"
            )

    def _evaluation_due(self, step: int) -> bool:
        every = self.recipe.train.eval_every_tokens
        return step * self.tokens_per_step // every > (step - 1) * self.tokens_per_step // every

    def _evaluate(self, step: int) -> dict[str, float]:
        self.meter.phase("evaluation")
        self.telemetry.leave()
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
        metrics |= self.hooks.evaluate(self.recipe, self.model, step)
        # the row's clock is what `moe compare` looks up in the ledger: a loss costs its measuring too
        row = {"train/step": step, "train/tokens": step * self.tokens_per_step, **metrics}
        self.tracking.log(row | self.meter.cost().row(self.recipe.energy))
        return metrics

    def _save(self, step: int) -> None:
        """Take a snapshot and have it written. Raises CheckpointError when this write and the one before failed."""
        self._check_finite(step)
        self.meter.phase("checkpoint")
        self.telemetry.leave()
        tokens = step * self.tokens_per_step
        ledger = self.meter.flush(step, tokens)
        self.tracking.sync()
        state: dict[str, Any] = {"tokens": tokens, "ledger": ledger}
        if self.recipe.data.streaming:
            state["data"] = self.batches.places(self.engine.device)
        if self.guard is not None:
            state["recent_steps"] = self.guard.recent
        self.saver.save(step, partial(self.engine.capture, self.model, self.optimizer, state))
        self.tracking.log({"train/step": step, "efficiency/checkpoint_stall_s": self.saver.stall_s})


def _postfix(loss: float, metrics: dict[str, float], cost: Cost) -> str:
    parts = [f"loss {loss:.3f}"]
    if "eval/loss" in metrics:
        parts.append(f"eval {metrics['eval/loss']:.3f}")
    if "eval/max_vio" in metrics:
        parts.append(f"MaxVio {metrics['eval/max_vio']:.2f}")
    parts.append(f"{cost.kwh * 1000:.2f} Wh")
    return ", ".join(parts)
