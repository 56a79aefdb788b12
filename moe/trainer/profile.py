"""torch's profiler over three steps, written into the run's folder `profile`."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from moe.parallel import ranks

__all__ = ["Profile"]

_STEPS = 3


class Profile:
    """Traces steps `at_step` … `at_step` + 2, the first being 1; None traces nothing.

    Leaves `step_00000010.rank0.json.gz`, a trace for https://ui.perfetto.dev, and `….txt`, the operators by their own
    time. The traced steps are slower than others.
    """

    def __init__(self, folder: Path, at_step: int | None) -> None:
        self._folder, self._at_step = folder, at_step
        self._profiler: Any = None

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Around step number `step`, from 1."""
        if self._at_step is None or not self._at_step <= step < self._at_step + _STEPS:
            self.close()
            return nullcontext()
        if self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()
        return torch.profiler.record_function(f"step {step}")

    def close(self) -> None:
        """Write what was traced."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        stem = f"step_{self._at_step:08d}.rank{ranks.rank()}"
        profiler.export_chrome_trace(str(self._folder / f"{stem}.json.gz"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=50)
        (self._folder / f"{stem}.txt").write_text(table + "\n", encoding="utf-8")
