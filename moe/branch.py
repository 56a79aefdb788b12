"""A new run out of a trunk: its steps up to a checkpoint are shared, then the learning rate decays.

One level trunk serves many lengths (warm-up-stable-decay, arXiv:2404.06395): each branch is a whole run of its own,
with the trunk's metrics, data facts and energy ledger up to that step, so that whatever reads a run directory sees the
cost of its whole lineage. `branch.json` says which part of that the trunk has too:

    {"trunk": name, "step": n, "tokens": n, "ledger": {"segment", "seq"}, "shared": {"energy_j", "device_hours"}}

Whoever adds up the runs of a programme counts `shared` once.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from moe.checkpoint import list_checkpoints, read_state, step_of, verify
from moe.config import Recipe
from moe.energy import LedgerPosition, fold_ledgers
from moe.energy.cut import cut_ledger
from moe.errors import CheckpointError, ConfigError, LedgerError
from moe.rundir import RunDir, write_json
from moe.schedule import decay_start

__all__ = ["branch"]


def branch(trunk: RunDir, step: int, decay_steps: int, name: str | None = None) -> RunDir:
    """Make the run `name`, beside `trunk`, that goes on from its checkpoint of `step` and decays over `decay_steps`.

    The trunk may still be training; it is only read. Checkpoint files and tokens are hard links where the disk has
    them. Counted are the joules up to the trunk's last reading before the checkpoint, a few seconds earlier at most.

    Raises ConfigError for steps, a name or a schedule that do not fit, CheckpointError for a checkpoint that is not
    there or damaged, CompareError and LedgerError when the trunk's files cannot be read.
    """
    recipe = Recipe.read(trunk.config)
    _check_schedule(recipe, trunk, step, decay_steps)
    checkpoint = _checkpoint(trunk, step)
    state = read_state(checkpoint)
    run = RunDir.named(name or f"{trunk.name}-at-{step}", trunk.root.parent)
    if run.root.exists():
        raise ConfigError(f"{run.root} exists; choose another name with --name NAME")
    changed = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, name=run.name),
        train=dataclasses.replace(recipe.train, max_steps=step + decay_steps, resume="auto"),
        optim=dataclasses.replace(recipe.optim, decay_steps=decay_steps),
    )
    aside = RunDir(run.root.with_name(f".{run.name}.{os.getpid()}"))
    try:
        aside.create()
        _fill(aside, trunk, checkpoint, state)
        write_json(aside.config, changed.to_dict())
        aside.root.rename(run.root)
    except OSError as error:
        raise ConfigError(f"{run.root} cannot be written ({error.strerror}); choose a folder with room") from None
    finally:
        shutil.rmtree(aside.root, ignore_errors=True)
    return run


def _check_schedule(recipe: Recipe, trunk: RunDir, step: int, decay_steps: int) -> None:
    if decay_steps < 1:
        raise ConfigError(f"--decay {decay_steps} must be at least 1: a run that goes on level is the trunk itself")
    optim = recipe.optim
    if optim.schedule != "wsd":
        raise ConfigError(
            f"{trunk.root} has optim.schedule={optim.schedule}, which falls from the warm-up on; "
            "branch from a run with optim.schedule=wsd"
        )
    start = decay_start(optim, recipe.train.max_steps)
    if step > start:
        raise ConfigError(f"--at {step}: {trunk.root} has decayed since step {start}; branch there or before")
    if step < optim.warmup_steps:
        raise ConfigError(
            f"--at {step} lies within the warm-up of {trunk.root}; branch at {optim.warmup_steps} or later"
        )


def _checkpoint(trunk: RunDir, step: int) -> Path:
    found = {step_of(path): path for path in list_checkpoints(trunk.checkpoints)}
    if step not in found:
        there = f"there are {', '.join(map(str, found))}" if found else "there is none"
        raise CheckpointError(
            f"{trunk.root} has no checkpoint of step {step}; {there} (train.keep_checkpoints says how many are kept)"
        )
    verify(found[step])
    return found[step]


def _fill(run: RunDir, trunk: RunDir, checkpoint: Path, state: dict[str, Any]) -> None:
    """Everything of the trunk up to the checkpoint: its files, ledgers and metrics, and branch.json."""
    try:
        verify(Path(shutil.copytree(checkpoint, run.checkpoints / checkpoint.name, copy_function=_link)))
    except (shutil.Error, FileNotFoundError, CheckpointError):
        raise CheckpointError(f"{checkpoint} was deleted while it was copied; branch from a newer one") from None
    with contextlib.suppress(shutil.Error, FileNotFoundError):  # not there, or being replaced: the branch makes its own
        shutil.copytree(trunk.tokens, run.tokens, copy_function=_link)
    for file in (trunk.data, trunk.tokenizer, trunk.tokenizer_config):
        if file.is_file():  # a run on tokens of a hook's own has no tokenizer
            shutil.copyfile(file, run.root / file.name)
    if trunk.skipped.is_file():
        passed_over = [entry for entry in trunk.read_json(trunk.skipped)["skipped"] if entry["step"] <= state["step"]]
        write_json(run.skipped, {"skipped": passed_over})
    position: LedgerPosition = state["ledger"]
    _cut_ledgers(run, trunk, position, f"branched at step {state['step']}")
    _cut_metrics(run, trunk, position["segment"], state["step"])
    shared = fold_ledgers(run.ledgers()).total
    write_json(
        run.branch,
        {
            "trunk": trunk.name,
            "step": state["step"],
            "tokens": state["tokens"],
            "ledger": position,
            "shared": {"energy_j": shared.energy_j, "device_hours": shared.device_hours},
        },
    )


def _link(source: str, target: str) -> None:
    """Checkpoints and tokens are replaced and deleted, never written into, so two runs may have the same file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _cut_ledgers(run: RunDir, trunk: RunDir, position: LedgerPosition, reason: str) -> None:
    """The first node's ledger up to the checkpoint's line; the others' up to the same moment, as clocks of day tell."""
    first, *others = trunk.ledgers() or [trunk.ledger()]
    end = cut_ledger(first, run.root / first.name, lambda line: line["seq"] <= position["seq"], reason)
    if end is None or (end["segment"], end["seq"]) != (position["segment"], position["seq"]):
        raise LedgerError(f"ledger {first} does not reach the checkpoint's line {position}; restore it from a copy")
    for ledger in others:
        cut_ledger(ledger, run.root / ledger.name, lambda line: line["utc"] <= end["utc"], reason)


def _cut_metrics(run: RunDir, trunk: RunDir, segment: int, step: int) -> None:
    """Rows that were there when the checkpoint was written: earlier segments', and its own up to the step."""
    with trunk.metrics.open(encoding="utf-8") as lines, run.metrics.open("w", encoding="utf-8") as kept:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill
                continue
            if row["segment"] < segment or (row["segment"] == segment and row["train/step"] <= step):
                kept.write(line)
