"""Making a run's parts in the right order, and a recipe's command line."""

import dataclasses
import errno
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NoReturn

import torch

from moe.balancer import Balancer
from moe.config import Recipe, parse_overrides
from moe.config.parse import help_text
from moe.data import TrainingData
from moe.errors import ConfigError, MoEError
from moe.layers.experts import multiply_in_fp8
from moe.model import Transformer
from moe.optim import build_optimizer
from moe.parallel import ranks
from moe.parallel.engine import Engine
from moe.parallel.launch import start_engine
from moe.rundir import RunDir, write_json
from moe.tracking import Tracking
from moe.trainer import host_memory, memory
from moe.trainer.data import load_run_data
from moe.trainer.environment import describe
from moe.trainer.hooks import Hooks
from moe.trainer.loop import Loop, Outcome
from moe.trainer.metering import TrainingMeter
from moe.trainer.signals import Stopped, StopRequest, leave
from moe.trainer.start import Start, discard_later, find_start
from moe_kernels.configs import obstacle_to_fp8

__all__ = ["exit_with", "main", "train"]

_FIRST_SPEAKS_S = 5.0  # torchrun looks at its processes ten times a second, and ends all when one has failed
_SEEN_WITHIN_S = 90.0  # NFS may call a folder missing for a minute that was looked for before it was made
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(recipe: Recipe, words: Sequence[str] | None = None, *, hooks: Hooks | None = None) -> None:
    """A recipe file's entry: apply the command line's `section.field=value` words, train, exit.

    A MoEError becomes its one sentence on the first local rank's stderr, and exit code 2. A run stopped by a signal
    exits with 128 + the signal's number once its checkpoint is written.
    """
    words = sys.argv[1:] if words is None else words
    if "--help" in words or "-h" in words:
        print(help_text(recipe))
        return
    try:
        outcome = train(parse_overrides(recipe, words), hooks=hooks)
    except MoEError as error:
        exit_with(str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        name = error.filename or "a file"
        exit_with(f"{name} cannot be written ({error.strerror}); mend that, and the same command goes on")
    if outcome.reason in signal.Signals.__members__:
        leave(128 + signal.Signals[outcome.reason])


def train(recipe: Recipe, *, hooks: Hooks | None = None) -> Outcome:
    """Train `recipe` to its end, a budget or a signal, resuming where its run directory stands.

    `hooks` replace the objective, or add to the evaluation; see `moe.trainer.Hooks`.

    Raises ConfigError, DataError, CheckpointError, LedgerError, SensorError or TrainingError; the run directory is
    whole whatever happens, and signals are handled as before the call once it is over.
    """
    run = RunDir.named(recipe.run.name, recipe.run.directory)
    hooks = hooks or Hooks()
    with ExitStack() as closing:
        stop = StopRequest()
        closing.callback(stop.restore)
        engine = start_engine(recipe)
        closing.callback(engine.close)
        _check_fp8(recipe, engine.device)
        memory.check(recipe, recipe.train.micro_batch(engine.ranks), engine.device, engine.ranks)
        try:
            outcome = _segment(recipe, run, engine, hooks, stop)
            while outcome.reason == "rollback":
                engine.release()
                again = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, resume="auto"))
                outcome = _segment(again, run, engine, hooks, stop)
        except MoEError as error:
            _say_unless_the_first_does(error, stop)
            raise
        return outcome


def _segment(recipe: Recipe, run: RunDir, engine: Engine, hooks: Hooks, stop: StopRequest) -> Outcome:
    """From where the run directory stands to the end, or to a rollback; one segment of the ledger and the metrics."""
    with ExitStack() as closing:
        start = find_start(recipe, run)
        _check_agreement(start, engine)
        for complaint in start.complaints:
            ranks.say(f"passed over: {complaint}")
        if start.step >= recipe.train.max_steps:
            where = f"{run.root} is complete at step {start.step}"
            ranks.say(f"{where}; raise train.max_steps to train on, or take a new run.name")
            return Outcome(start.step, "complete")
        if ranks.is_first():
            run.create()
        ranks.barrier()
        _check_shared(run, engine)

        # the ledger's lock is the run's: a second launch stops here, before it has changed a file
        meter = TrainingMeter(recipe, run, engine, start)
        closing.callback(meter.stop)
        if ranks.is_first():
            for discarded in discard_later(run, start):
                ranks.say(f"set aside: {discarded}, which is beyond step {start.step}")
            write_json(run.config, recipe.to_dict())
            write_json(run.environment, {**describe(engine.device, meter.device_uuids, hooks), "engine": engine.name})
        tracking = Tracking(recipe, run, segment=meter.segment, resumed_step=start.step)
        closing.callback(tracking.close)
        meter.phase("data")
        try:
            with stop.at_once():
                data = load_run_data(recipe, run, hooks, trained=start.trained)
        except Stopped:
            outcome = Outcome(start.step, stop.signal.name if stop.signal else "SIGTERM")
            ranks.say(_farewell(run, outcome))
            return outcome
        meter.phase("idle")
        loop = _loop(recipe, run, engine, start, data, hooks, meter, tracking, stop)
        ranks.say(f"memory: {memory.sentence(memory.budget(recipe, loop.micro_batch))}")
        outcome = loop.steps()
        if ranks.is_first():
            write_json(run.memory, memory.report(recipe, loop.micro_batch, engine.device))
        if outcome.reason != "rollback":
            ranks.say(_farewell(run, outcome))
        return outcome


def _loop(
    recipe: Recipe,
    run: RunDir,
    engine: Engine,
    start: Start,
    data: TrainingData,
    hooks: Hooks,
    meter: TrainingMeter,
    tracking: Tracking,
    stop: StopRequest,
) -> Loop:
    """Model, optimizer and balancer, new or as the checkpoint left them."""
    if engine.device.type == "cpu":
        host_memory.keep_freed()  # from here on: what reading the text took was given back
    torch.manual_seed(recipe.run.seed)
    model = Transformer(recipe.model).to(engine.device)
    if recipe.train.precision == "fp8" and not multiply_in_fp8(model):  # the one place that turns it on
        ranks.say("train.precision=fp8 is for routed experts, and this model has none: it trains as with bf16")
    optimizer = build_optimizer(model, recipe.optim)
    state = {}
    if start.checkpoint:
        state = engine.load(start.checkpoint, model, optimizer)
        ranks.say(f"{run.root} goes on from step {start.step} of {recipe.train.max_steps}")
    model.recompute(recipe.train.recompute_layers)
    if recipe.train.compile:
        model.compile()
    balancer = Balancer(model, **recipe.balance.to_dict())
    return Loop(
        recipe, run, engine, model, optimizer, balancer, data, hooks, meter, tracking, stop,
        first_step=start.step, state=state,
    )  # fmt: skip


def _check_fp8(recipe: Recipe, device: torch.device) -> None:
    """Refuse what the device has no instructions for, before any text is read."""
    if recipe.train.precision == "fp8" and recipe.model.is_moe and (lack := obstacle_to_fp8(device)):
        recipe.train.fail("precision", f"{lack}; use bf16")


def _check_agreement(start: Start, engine: Engine) -> None:
    """Every rank must have found the same checkpoint: the run directory lies in a folder that all nodes share."""
    steps = ranks.gather_texts(str(start.step), engine.device)
    if len(set(steps)) > 1:
        raise ConfigError(
            f"ranks found checkpoints of steps {', '.join(steps)}: run.directory must be shared by all nodes"
        )


def _check_shared(run: RunDir, engine: Engine) -> None:
    """Every rank must see the run directory: it reads tokens there that the first rank makes."""
    until = time.monotonic() + _SEEN_WITHIN_S
    while not (sees := run.checkpoints.is_dir()) and time.monotonic() < until:
        time.sleep(0.5)
    seen = ranks.gather_texts("yes" if sees else "no", engine.device)
    if "no" in seen:
        raise ConfigError(
            f"rank {seen.index('no')} does not see the run directory {run.root}, which the first has made; "
            "run.directory must be shared by all nodes"
        )


def _farewell(run: RunDir, outcome: Outcome) -> str:
    if outcome.reason == "complete":
        loss = outcome.metrics.get("eval/loss")
        return f"{run.root} is complete at step {outcome.step}" + (f", eval/loss {loss:.4f}" if loss else "")
    cause = "its budget is spent" if outcome.reason == "budget" else f"{outcome.reason} asked it to"
    return f"{run.root} stopped at step {outcome.step} because {cause}; the same command goes on from there"


def exit_with(sentence: str) -> NoReturn:
    """End the process with exit code 2 and this sentence, which the first local rank says for all."""
    if ranks.local_rank() == 0:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _say_unless_the_first_does(error: MoEError, stop: StopRequest) -> None:
    """On other local ranks: what all ranks met the first says for all, and the launcher ends us while we wait.

    When it does not, the error is this rank's alone, and must be said before it leaves the group and the others fail
    without knowing why.
    """
    if ranks.local_rank() == 0:
        return
    until = time.monotonic() + _FIRST_SPEAKS_S
    while time.monotonic() < until:
        if stop:
            raise SystemExit(2)
        time.sleep(0.05)
    print(f"\nerror: {error} (rank {ranks.rank()})", file=sys.stderr, flush=True)
