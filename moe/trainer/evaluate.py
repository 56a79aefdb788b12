"""The validation loss, with its standard error, and how even the experts' load is on the whole validation set."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe.balancer import LoadCounter
from moe.data import SequenceReader
from moe.data.sequences import document_ids
from moe.data.tokens import DataFacts
from moe.parallel import ranks
from moe.parallel.engine import Engine

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module,
    engine: Engine,
    sequences: SequenceReader,
    facts: DataFacts,
    *,
    count: int,
    batch_size: int,
    end_token: int | None = None,
) -> dict[str, float]:
    """Metrics `eval/*` over the first `count` sequences, split between the ranks; every rank gets the same numbers.

    `eval/loss` is nats per token; `eval/loss_se` the standard error of its mean over sequences; `eval/max_vio` that of
    the worst layer over all tokens evaluated. With `end_token` tokens attend to their own document alone.
    """
    each, left = divmod(count, engine.ranks)
    mine = range(ranks.rank() * each, (ranks.rank() + 1) * each)
    batches = [(first, min(batch_size, mine.stop - first)) for first in range(mine.start, mine.stop, batch_size)]
    if ranks.rank() < left:
        batches.append((each * engine.ranks + ranks.rank(), 1))

    def losses(first: int, size: int) -> Tensor:
        ids = engine.to_device(sequences.batch(first, size))
        with engine.autocast():
            return _sequence_losses(model, ids, end_token).double().cpu()

    sums = torch.zeros(3, dtype=torch.float64)  # sequences, their mean losses, the squares of those
    with _evaluating(model, engine):
        with LoadCounter(model) as counter:
            for first, size in batches:
                found = losses(first, size)
                sums += torch.stack((torch.tensor(float(size)), found.sum(), (found**2).sum()))
        if 0 < left <= ranks.rank():
            losses(0, 1)  # not counted: where ranks share the weights, all must make the same passes
        load = counter.load()
    number, total, squares = ranks.sum_numbers(sums.tolist(), engine.device)
    mean = total / number
    variance = max(0.0, squares / number - mean**2) * number / max(1.0, number - 1)
    metrics = {
        "eval/loss": mean,
        "eval/sequences": number,
        "eval/loss_se": math.sqrt(variance / number),
        "eval/bits_per_byte": mean / math.log(2) * facts.validation_tokens / facts.validation_bytes,
    }
    return metrics | {name.replace("router/", "eval/", 1): value for name, value in load.metrics().items()}


def _sequence_losses(model: nn.Module, ids: Tensor, end_token: int | None) -> Tensor:
    """Mean next-token loss of each sequence, (B,), in fp32; sequence by sequence, for the head's memory."""
    out = model(ids, document_ids=None if end_token is None else document_ids(ids, end_token))
    losses = [out.head(hidden[:-1], tokens[1:]) for hidden, tokens in zip(out.hidden, ids, strict=True)]
    return torch.stack(losses) / (ids.shape[1] - 1)


@contextmanager
def _evaluating(model: nn.Module, engine: Engine) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with engine.evaluating():
            yield
    finally:
        model.train(training)
