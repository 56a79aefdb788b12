"""A run's data: the first rank puts the tokenizer into the run directory, every rank reads it there and loads alike."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

from moe.config import Recipe
from moe.data import DataFacts, Sampling, TrainingData, WithinVocabulary, load_data, make_tokenizer, open_sources
from moe.data.tokenizer import copy_tokenizer
from moe.errors import ConfigError
from moe.parallel import ranks
from moe.rundir import RunDir, write_json
from moe.trainer.hooks import Hooks
from moe.trainer.signals import interruptible

__all__ = ["load_run_data"]


def load_run_data(recipe: Recipe, run: RunDir, hooks: Hooks, *, trained: bool) -> TrainingData:
    """What the run trains on and is evaluated on; its facts go into data.json.

    Raises DataError, and ConfigError when the run was trained on other text: half a curve on each would be no curve.
    """
    sampling = Sampling(seq_len=recipe.train.seq_len, seed=recipe.run.seed, rank=ranks.rank(), ranks=ranks.world_size())
    own = hooks.data(recipe, sampling)
    data = _checked(own, recipe) if own else _from_sources(recipe, run, sampling, trained=trained)
    if data.facts.vocab_size > recipe.model.vocab_size:
        recipe.model.fail("vocab_size", f"is less than the {data.facts.vocab_size} tokens of the data; make them equal")
    if trained and run.data.is_file():
        _check_same(recipe, run, data.facts)
    ranks.barrier()  # everyone has compared before the first rank writes
    if ranks.is_first():
        write_json(run.data, data.facts.to_dict())
    length = "a stream of" if data.facts.train_tokens is None else f"{data.facts.train_tokens:,}"
    ranks.say(
        f"{data.facts.source}: {length} training and {data.facts.validation_tokens:,} validation tokens, "
        f"corpus sha256 {data.facts.corpus_sha256[:16]}"
    )
    return data


def _checked(own: TrainingData, recipe: Recipe) -> TrainingData:
    """A hook's data, every batch of which is looked at before the model sees it."""
    train, validation = (
        WithinVocabulary(reader, own.facts.source, recipe.model.vocab_size) for reader in (own.train, own.validation)
    )
    return dataclasses.replace(own, train=train, validation=validation)


def _from_sources(recipe: Recipe, run: RunDir, sampling: Sampling, *, trained: bool) -> TrainingData:
    sources, vocab_size = open_sources(recipe.data), recipe.model.vocab_size
    if ranks.is_first() and not (trained and run.tokenizer.is_file()):
        # a thread that is left to itself must not write into a run directory that somebody else may hold by then
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            made = Path(folder, run.tokenizer.name)
            interruptible(lambda: make_tokenizer(sources, recipe.data, vocab_size, made))
            copy_tokenizer(made, None, run.tokenizer)
    ranks.barrier()
    return interruptible(
        lambda: load_data(sources, recipe.data, run.tokenizer, vocab_size, sampling, verify=ranks.is_first())
    )


def _check_same(recipe: Recipe, run: RunDir, facts: DataFacts) -> None:
    found = facts.to_dict()
    for name, before in run.read_json(run.data).items():
        if name.endswith("sha256") and found.get(name) != before:
            raise ConfigError(
                f"data.source={recipe.data.source}: {name} is {str(found.get(name))[:16]}, but run "
                f"{recipe.run.name!r} was trained with {str(before)[:16]}; restore that text (and Python version, "
                "for stdlib), or choose another run.name"
            )
