"""What a metrics row says of the machine: tokens a second, time a step and where it goes, MFU, memory."""

import time

import torch

from moe import accounting
from moe.accounting.peaks import peak_flops
from moe.config import Recipe
from moe.trainer.breakdown import Breakdown
from moe.trainer.memory import peak_bytes

__all__ = ["Telemetry"]


class Telemetry:
    """Times steps, each from `start` to `stop` or `pause`, and the trainer's own time between them."""

    def __init__(
        self, recipe: Recipe, device: torch.device, ranks: int, breakdown: Breakdown, *, first_step: int
    ) -> None:
        train = recipe.train
        self._device, self._breakdown = device, breakdown
        self._tokens_per_step = train.global_batch_size * train.seq_len
        self._flops_per_token = accounting.flops_per_token(recipe.model, train.seq_len)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(name, train.precision)
        self._peak_flops = None if peak is None else peak * ranks
        self._logged_step = first_step
        self._spent_s = self._idle_s = self._began = 0.0
        self._ended: float | None = None

    def start(self) -> None:
        """A step begins."""
        self._began = time.monotonic()
        if self._ended is not None:
            self._idle_s += self._began - self._ended

    def pause(self) -> None:
        """A step that is not logged is over."""
        self._ended = time.monotonic()
        self._spent_s += self._ended - self._began

    def leave(self) -> None:
        """Something other than steps follows, such as an evaluation: its time is neither the steps' nor idle."""
        self._ended = None

    def stop(self, step: int) -> dict[str, float]:
        """A logged step is over: `efficiency/*` of all steps since the last one.

        `efficiency/step_s` is the mean time of a step, and `efficiency/step_s/idle` of what lies between two: logging,
        and waiting for its numbers. The other `efficiency/step_s/COMPONENT` are of the one step that was split, when
        one was. `efficiency/mfu` is accounting's operations over the device's dense peak at the dtype of
        `train.precision`, bf16's under fp8, on devices whose peak is known (`moe.accounting.peaks`).
        """
        self.pause()
        steps = step - self._logged_step
        step_s = max(self._spent_s, 1e-9) / steps
        rate = self._tokens_per_step / step_s
        row = {
            "efficiency/tokens_per_s": rate,
            "efficiency/step_s": step_s,
            "efficiency/step_s/idle": self._idle_s / steps,
            "efficiency/peak_memory_bytes": float(peak_bytes(self._device)),
        }
        if self._peak_flops is not None:
            row["efficiency/mfu"] = self._flops_per_token * rate / self._peak_flops
        row |= {f"efficiency/step_s/{name}": seconds for name, seconds in self._breakdown.seconds().items()}
        self._spent_s, self._idle_s, self._logged_step = 0.0, 0.0, step
        return row
