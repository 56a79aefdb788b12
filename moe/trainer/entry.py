"""Making a run's parts in the right order, and a recipe's command line."""

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from moe.balancer import Balancer
from moe.checkpoint import load_checkpoint
from moe.config import Recipe, parse_overrides
from moe.config.parse import help_text
from moe.data import TokenData, load_corpus, prepare
from moe.data.tokens import train_tokenizer
from moe.errors import MoEError
from moe.model import Transformer
from moe.optim import build_optimizer
from moe.parallel import ranks
from moe.parallel.engine import Engine
from moe.rundir import RunDir, write_json
from moe.tracking import Tracking
from moe.trainer.environment import describe
from moe.trainer.loop import Loop, Outcome
from moe.trainer.metering import TrainingMeter
from moe.trainer.signals import StopRequest
from moe.trainer.start import find_start

__all__ = ["main", "train"]


def main(recipe: Recipe, words: Sequence[str] | None = None) -> None:
    """A recipe file's entry: apply the command line's `section.field=value` words, train, exit.

    A MoEError becomes its one sentence on the first local rank's stderr, and exit code 2. A run stopped by a signal
    exits with 128 + the signal's number once its checkpoint is written.
    """
    words = sys.argv[1:] if words is None else words
    if "--help" in words or "-h" in words:
        print(help_text(recipe))
        return
    try:
        outcome = train(parse_overrides(recipe, words))
    except MoEError as error:
        _exit(str(error))
    if outcome.reason in signal.Signals.__members__:
        raise SystemExit(128 + signal.Signals[outcome.reason])


def train(recipe: Recipe) -> Outcome:
    """Train `recipe` to its end, a budget or a signal, resuming where its run directory stands.

    Raises ConfigError, DataError, CheckpointError, LedgerError, SensorError or TrainingError; the run directory is
    whole whatever happens.
    """
    run = RunDir.named(recipe.run.name, recipe.run.directory)
    stop = StopRequest()
    engine = Engine(recipe.train)
    recipe.train.accumulation(engine.ranks)
    start = find_start(recipe, run)
    for complaint in start.complaints:
        _say(f"passed over: {complaint}")
    if start.step >= recipe.train.max_steps:
        _say(f"{run.root} is complete at step {start.step}; raise train.max_steps to train on, or take a new run.name")
        return Outcome(start.step, "complete")
    if ranks.is_first():
        run.create()
        write_json(run.config, recipe.to_dict())
    ranks.barrier()

    meter = TrainingMeter(recipe, run, engine, start)
    tracking = Tracking(recipe, run, segment=meter.segment, resumed_step=start.step)
    try:
        if ranks.is_first():
            write_json(run.environment, describe(engine.device, meter.device_uuids))
        meter.phase("data")
        data = _data(recipe, run, keep_tokenizer=start.trained)
        meter.phase("idle")
        torch.manual_seed(recipe.run.seed)
        model = Transformer(recipe.model).to(engine.device)
        optimizer = build_optimizer(model, recipe.optim)
        if start.checkpoint:
            load_checkpoint(start.checkpoint, model, optimizer)
            _say(f"{run.root} goes on from step {start.step} of {recipe.train.max_steps}")
        if recipe.train.compile:
            model.compile()
        balancer = Balancer(
            model, method=recipe.balance.method if recipe.model.is_moe else "none",
            bias_update_speed=recipe.balance.bias_update_speed,
        )  # fmt: skip
        loop = Loop(recipe, run, engine, model, engine.prepare(model), optimizer, balancer, data, meter, tracking, stop)
        outcome = loop.steps(start.step)
        _say(_farewell(run, outcome))
    finally:
        meter.stop()
        tracking.close()
        stop.restore()
        engine.close()
    return outcome


def _data(recipe: Recipe, run: RunDir, *, keep_tokenizer: bool) -> TokenData:
    """The first rank trains the tokenizer into the run directory; every rank reads it there and tokenises alike."""
    corpus = load_corpus(recipe.data)
    if ranks.is_first() and not (keep_tokenizer and run.tokenizer.is_file()):
        train_tokenizer(corpus, recipe.model.vocab_size, run.tokenizer)
    ranks.barrier()
    data = prepare(corpus, run.tokenizer, recipe.model.vocab_size)
    if ranks.is_first():
        write_json(run.data, data.facts.to_dict())
    facts = data.facts
    _say(
        f"{facts.source}: {facts.train_tokens:,} training and {facts.validation_tokens:,} validation tokens, "
        f"corpus sha256 {facts.corpus_sha256[:16]}"
    )
    return data


def _farewell(run: RunDir, outcome: Outcome) -> str:
    if outcome.reason == "complete":
        loss = outcome.metrics.get("eval/loss")
        return f"{run.root} is complete at step {outcome.step}" + (f", eval/loss {loss:.4f}" if loss else "")
    cause = "its budget is spent" if outcome.reason == "budget" else f"{outcome.reason} asked it to"
    return f"{run.root} stopped at step {outcome.step} because {cause}; the same command goes on from there"


def _say(sentence: str) -> None:
    if ranks.is_first():
        print(sentence, file=sys.stderr, flush=True)


def _exit(sentence: str) -> NoReturn:
    if ranks.local_rank() == 0:
        print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
