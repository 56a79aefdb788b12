"""The meter in transformers' Trainer: a ledger beside its checkpoints, and what the run cost so far in its logs.

>>> trainer = transformers.Trainer(model, args, train_dataset=data)
>>> EnergyCallback().add_to(trainer)
>>> trainer.train()                 # then: moe energy report OUTPUT_DIR
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from moe.energy import EnergyMeter, Source
from moe.energy.sources import EstimateSource, uuid_of
from moe.errors import SensorError

__all__ = ["EnergyCallback"]


class EnergyCallback(TrainerCallback):
    """Meters training on the first rank of each node; on the others it does nothing.

    ledger            by default ledger.jsonl in the Trainer's output_dir, ledger.nodeN.jsonl on further nodes; a
                      training that is resumed goes on in it
    declared_power_w  watts per device: replaces every sensor
    interval_s        between readings

    Logged beside the Trainer's own numbers, where all ranks are on one node: energy/total_kwh and train/device_hours,
    earlier segments included. Tokens are marked when the Trainer counts them (include_num_input_tokens_seen).
    """

    def __init__(
        self, ledger: Path | str | None = None, declared_power_w: float | None = None, interval_s: float = 1.0
    ) -> None:
        self._ledger = None if ledger is None else Path(ledger)
        self._declared_power_w, self._interval_s = declared_power_w, interval_s
        self._one_node = True
        self.meter: EnergyMeter | None = None

    def add_to(self, trainer: Any) -> None:
        """Add to a Trainer ahead of its trackers, so that they see the numbers; `callbacks=[…]` puts it after them."""
        trainer.callback_handler.callbacks.insert(1, self)  # behind the one that decides what each step does

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
        self._one_node = args.world_size <= ranks_here
        if args.local_process_index != 0:
            return
        node = args.process_index // ranks_here
        name = "ledger.jsonl" if node == 0 else f"ledger.node{node}.jsonl"
        gpus = _gpu_uuids(ranks_here if args.world_size > 1 else args.n_gpu) if args.device.type == "cuda" else []

        def started(sources: list[Source] | None) -> EnergyMeter:
            return EnergyMeter(
                ledger=self._ledger or Path(args.output_dir) / name,
                devices=gpus or None,
                declared_power_w=self._declared_power_w,
                interval_s=self._interval_s,
                resumed_step=state.global_step,
                resumed_tokens=state.num_input_tokens_seen,
                sources=sources,
            ).start()

        try:
            self.meter = started(None)
        except SensorError as error:
            print(f"energy is estimated from rated power: {error}", file=sys.stderr)
            self.meter = started([EstimateSource(gpu_uuids=gpus, note=str(error))])
        self.meter.phase("data")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phase("forward_backward")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phase("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.meter is not None:
            counted = args.include_num_input_tokens_seen != "no"
            self.meter.progress(state.global_step, state.num_input_tokens_seen if counted else None)
        self._phase("evaluation" if control.should_evaluate else "checkpoint" if control.should_save else "data")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phase("evaluation")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phase("checkpoint" if control.should_save else "data")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.meter is not None:
            self.meter.flush()
        self._phase("data")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.meter is None or logs is None or not self._one_node:
            return
        totals = self.meter.snapshot()
        numbers = {"train/device_hours": totals.device_hours}
        if totals.total_kwh is not None:
            numbers["energy/total_kwh"] = totals.total_kwh
        logs.update(numbers)
        state.log_history[-1].update(numbers)  # the Trainer wrote its history before it told us

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.meter is not None:
            self.meter.stop()

    def _phase(self, name: str) -> None:
        if self.meter is not None:
            self.meter.phase(name)


def _gpu_uuids(count: int) -> list[str]:
    """The meter's names of this process's first `count` GPUs, which are those of the ranks of its node."""
    hip = torch.version.hip is not None
    return [uuid_of(torch.cuda.get_device_properties(number), hip=hip) for number in range(count)]
