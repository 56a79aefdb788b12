"""Which sequences a step trains on: this rank's share, read ahead; and the place in a stream that checkpoints keep."""

from typing import Any

import torch
from torch import Tensor

from moe.data import Prefetch, SequenceReader
from moe.errors import CheckpointError
from moe.parallel import ranks
from moe.trainer.rollback import PassedOver

__all__ = ["Batches"]


class Batches:
    """Micro-batches by step. A step's sequences are a function of its number and of what rollbacks passed over.

    Args:
        train: training sequences; of a stream only this rank's share, which knows no numbers and goes only forwards.
        sequential: it is a stream.
        global_batch_size, micro_batch_size, accumulation: sequences a step, sequences a micro-batch, and how many of
            those a rank passes in a step.
    """

    def __init__(
        self,
        train: SequenceReader,
        passed_over: PassedOver,
        *,
        sequential: bool,
        global_batch_size: int,
        micro_batch_size: int,
        accumulation: int,
    ) -> None:
        self._train, self._passed_over, self._sequential = train, passed_over, sequential
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._accumulation = accumulation
        self._ahead = Prefetch(self._read)
        self._waited_s = 0.0
        self._taken = self._place = train.state()

    def take(self, step: int) -> list[Tensor]:
        """Step number `step`, from 0: (B, S) int64 on the CPU for each micro-batch of this rank."""
        micro_batches, self._taken = self._ahead.take(step)
        return micro_batches

    def accept(self) -> None:
        """The step taken last was made: a checkpoint from here on goes on behind its batch."""
        self._place = self._taken

    def waited_s(self) -> float:
        """Seconds that `take` waited for text to be read, since this was asked last."""
        waited, self._waited_s = self._ahead.wait_s - self._waited_s, self._ahead.wait_s
        return waited

    def sequences(self, step: int) -> str:
        """A step's sequences in words, for messages."""
        first = self._first(step)
        return f"sequences {first} to {first + self._global_batch_size - 1}"

    def places(self, device: torch.device) -> list[dict[str, Any]]:
        """Every rank's place in its stream, for the checkpoint; nothing for text that has numbers."""
        return ranks.gather_json(self._place, device) if self._sequential else []

    def restore(self, places: list[dict[str, Any]], step: int) -> None:
        """Go on behind step `step`, from the places its checkpoint kept.

        Raises ConfigError when those were of another number of ranks, CheckpointError when there are none.
        """
        if not self._sequential or step == 0:
            return
        if not places:
            raise CheckpointError(f"the checkpoint of step {step} has no place in the stream; use another")
        self._train.restore(places[min(ranks.rank(), len(places) - 1)])
        self._taken = self._place = self._train.state()

    def close(self) -> None:
        """End the reading ahead."""
        self._ahead.close()

    def _first(self, step: int) -> int:
        return (step + self._passed_over.before(step)) * self._global_batch_size

    def _read(self, step: int) -> tuple[list[Tensor], dict[str, Any]]:
        first = self._first(step) + ranks.rank() * self._micro_batch_size * self._accumulation
        passed_over = self._passed_over.at(step) if self._sequential else 0
        for back in range(passed_over, 0, -1):  # what only goes forwards has to be read to be passed over
            self._micro_batches(first - back * self._global_batch_size)
        return self._micro_batches(first), self._train.state()

    def _micro_batches(self, first: int) -> list[Tensor]:
        return [
            self._train.batch(first + number * self._micro_batch_size, self._micro_batch_size)
            for number in range(self._accumulation)
        ]
