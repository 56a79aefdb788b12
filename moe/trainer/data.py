"""A run's data: the first rank puts tokenizer and tokens into the run directory, every rank reads them there alike."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from moe.config import Recipe
from moe.data import (
    DataFacts,
    Sampling,
    TrainingData,
    WithinVocabulary,
    load_data,
    make_tokenizer,
    open_encoder,
    open_sources,
    own_texts,
)
from moe.data.run_tokens import holds, tokenise
from moe.data.shards import PreparedFolder
from moe.data.sources import Source
from moe.data.tokenizer import DocumentEncoder, copy_tokenizer
from moe.errors import ConfigError, DataError
from moe.parallel import ranks
from moe.rundir import RunDir, write_json
from moe.trainer.hooks import Hooks
from moe.trainer.signals import interruptible

__all__ = ["load_run_data"]

_MAKING = ".making_"  # how folders begin in which something is made aside
_LEFT = "another rank left while the run's text was made ready; what it met stands above, or on its node"


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
    sources = open_sources(recipe.data)
    try:
        wait_for_first = ranks.patient_barrier()
    except RuntimeError:
        raise DataError(_LEFT) from None
    if ranks.is_first():
        _make(sources, recipe, run, trained=trained)
    try:
        interruptible(wait_for_first)
    except RuntimeError:
        raise DataError(_LEFT) from None

    def load() -> TrainingData:
        encoder = open_encoder(run.tokenizer, recipe.model.vocab_size)
        return load_data(sources, recipe.data, encoder, run.tokens, sampling, verify=ranks.is_first())

    return interruptible(load)


def _make(sources: Sequence[Source | PreparedFolder], recipe: Recipe, run: RunDir, *, trained: bool) -> None:
    """Tokenizer and tokens, where they are not there from an earlier start.

    All is made aside, in a folder that no other start knows, and takes its name when it is whole: a kill leaves nothing
    half-written, and a thread that is left to itself writes nothing into a run that somebody else may hold by then.
    """
    for left in run.root.glob(f"{_MAKING}*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_MAKING, dir=run.root, ignore_cleanup_errors=True) as folder:
        if not (trained and run.tokenizer.is_file()):
            made = Path(folder, run.tokenizer.name)
            interruptible(lambda: make_tokenizer(sources, recipe.data, recipe.model.vocab_size, made))
            copy_tokenizer(made, None, run.tokenizer)
        encoder = open_encoder(run.tokenizer, recipe.model.vocab_size)
        for source, place in own_texts(sources, recipe.data, run.tokens):
            _make_tokens(source, encoder, place, Path(folder, place.name))
    wanted = {place for _, place in own_texts(sources, recipe.data, run.tokens)}
    for left in set(run.tokens.glob("*")) - wanted:  # by a start from other sources, before anything was trained
        shutil.rmtree(left, ignore_errors=True)


def _make_tokens(source: Source, encoder: DocumentEncoder, place: Path, aside: Path) -> None:
    if interruptible(lambda: holds(place, source, encoder)):
        return
    shutil.rmtree(place, ignore_errors=True)
    try:
        interruptible(lambda: tokenise(source, encoder, aside))
        place.parent.mkdir(exist_ok=True)
        aside.rename(place)
    except OSError as error:
        raise DataError(
            f"the tokens of data.source={source.name!r} cannot be written to {place} ({error.strerror}); they take two "
            "to four bytes each: mend that, or make room, and the same command goes on"
        ) from None


def _check_same(recipe: Recipe, run: RunDir, facts: DataFacts) -> None:
    found = facts.to_dict()
    for name, before in run.read_json(run.data).items():
        if name.endswith("sha256") and found.get(name) != before:
            raise ConfigError(
                f"data.source={recipe.data.source}: {name} is {str(found.get(name))[:16]}, but run "
                f"{recipe.run.name!r} was trained with {str(before)[:16]}; restore that text (and Python version, "
                "for stdlib), or choose another run.name"
            )
