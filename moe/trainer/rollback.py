"""Which batches rollbacks passed over, written down so that every later start passes over them too."""

from typing import Any

from moe.errors import TrainingError
from moe.parallel import ranks
from moe.rundir import RunDir, write_json

__all__ = ["PassedOver"]

_MOST = 3  # rollbacks to one checkpoint


class PassedOver:
    """Batches that rollbacks left out, in the run's skipped.json: a list of {step, batches, cause}.

    From `step` on, batches are taken so much further along: which batch a step sees stays a function of the run
    directory alone, wherever the run is resumed.
    """

    def __init__(self, run: RunDir) -> None:
        self._file = run.skipped
        self._entries: list[dict[str, Any]] = run.read_json(self._file)["skipped"] if self._file.is_file() else []

    def before(self, step: int) -> int:
        """How many batches steps up to `step` have passed over."""
        return sum(entry["batches"] for entry in self._entries if entry["step"] <= step)

    def at(self, step: int) -> int:
        """How many batches lie between those of the step before and of `step`, passed over."""
        return sum(entry["batches"] for entry in self._entries if entry["step"] == step)

    def roll_back(self, back_to: int, step: int, cause: str) -> None:
        """Write down that the run goes back to step `back_to` and on with the batches after those of step `step`.

        Every rank must call it. Raises TrainingError, with `cause`, when the run has gone back there often enough.
        """
        if sum(entry["step"] == back_to for entry in self._entries) == _MOST:
            raise TrainingError(
                f"{cause}, after {_MOST} rollbacks to step {back_to}: other batches do not help; "
                "train.resume an earlier checkpoint, or start a new run.name with a lower optim.lr"
            )
        ranks.barrier()  # everyone has counted before the first rank writes
        self._entries.append({"step": back_to, "batches": step - back_to, "cause": cause})
        if ranks.is_first():
            write_json(self._file, {"skipped": self._entries})
