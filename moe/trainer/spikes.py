"""What a spike is: loss or gradient norm far above those of the steps before, or not finite."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

__all__ = ["SpikeGuard"]

_WINDOW = 128
_ENOUGH = 16  # steps, before a standard deviation says anything


class SpikeGuard:
    """Judges loss and gradient norm of a step before its update is made, by those of the last 128 accepted steps.

    `sigmas` standard deviations above their mean is a spike; None refuses only what is not finite.
    """

    def __init__(self, sigmas: float | None, recent: Sequence[Sequence[float]] = ()) -> None:
        self._sigmas = sigmas
        self._recent: deque[tuple[float, float]] = deque(((loss, norm) for loss, norm in recent), maxlen=_WINDOW)

    def complaint(self, loss: float, norm: float) -> str | None:
        """Why the step is refused, as the beginning of a sentence; or None, and it is remembered."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"train/loss is {loss} and train/grad_norm is {norm}"
        if self._sigmas is not None and len(self._recent) >= _ENOUGH:
            for position, (name, value) in enumerate((("train/loss", loss), ("train/grad_norm", norm))):
                past = [step[position] for step in self._recent]
                above = (value - statistics.fmean(past)) / max(statistics.stdev(past), 1e-12)
                if above > self._sigmas:
                    return f"{name} is {value:.4g}, {above:.1f} standard deviations above the {len(past)} steps before"
        self._recent.append((loss, norm))
        return None

    @property
    def recent(self) -> list[list[float]]:
        """What the next judgement depends on, for the checkpoint."""
        return [list(step) for step in self._recent]
