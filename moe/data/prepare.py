"""Tokenising once, ahead of training: sources into a folder of shards for many runs, resumable after a kill."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moe.config import DataConfig
from moe.data.shards import INDEX, PreparedFolder, sha256_of
from moe.data.sources import open_source
from moe.data.tokenizer import DocumentEncoder, copy_tokenizer, tokenizer_file, train_tokenizer
from moe.data.write_shards import SHARD_TOKENS, fill, new_index
from moe.errors import DataError
from moe.rundir import write_json

__all__ = ["prepare"]


def prepare(config: DataConfig, out: Path, *, vocab_size: int | None = None, shard_tokens: int = SHARD_TOKENS) -> bool:
    """Tokenise `config.sources`, one after another, into `out`, with `config.tokenizer`, or one trained on them.

    Returns whether anything was left to do. Raises DataError when the sources cannot be read, when `out` was begun with
    other settings or holds other files, and when it cannot be written.
    """
    if (vocab_size is None) == (config.tokenizer is None):
        raise DataError("the tokens need --vocab-size N to train a tokenizer, or --tokenizer FILE to use one; give one")
    given = None if config.tokenizer is None else tokenizer_file(config.tokenizer)
    settings = {
        "sources": list(config.sources),
        "text_field": config.text_field,
        "validation_fraction": config.validation_fraction,
        "end_token": config.end_token,
        "vocab_size": vocab_size,
        "tokenizer_sha256": given and sha256_of(given),
        "tokenizer_documents": config.tokenizer_documents,
        "shard_tokens": shard_tokens,
    }
    try:
        with _alone_in(out):
            return _prepare(config, out, given, settings)
    except OSError as error:
        raise DataError(f"--out {out} cannot be written ({error.strerror}); the same command goes on") from None


def _prepare(config: DataConfig, out: Path, given: Path | None, settings: dict[str, Any]) -> bool:
    index = _begun(out, settings)
    if index["complete"]:
        return False
    sources = [open_source(word, config) for word in config.sources]
    tokenizer = out / "tokenizer.json"
    if not tokenizer.is_file():
        if given is not None:
            copy_tokenizer(given, config.end_token, tokenizer)
        else:
            first = (islice(source.documents("train"), config.tokenizer_documents) for source in sources)
            train_tokenizer(chain.from_iterable(first), settings["vocab_size"], tokenizer)
    fill(sources, DocumentEncoder(tokenizer), out, index)
    return True


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The index in `out`, a new one where no shard is finished. Raises DataError when it is of another preparation."""
    if PreparedFolder.is_at(out):
        index = PreparedFolder.index_at(out)
        before = index["settings"]
        if before == settings:
            return index
        if any(index[split]["shards"] for split in ("train", "validation")):
            name = next(name for name in settings if before.get(name) != settings[name])
            raise DataError(
                f"--out {out} was begun with {name}={before.get(name)!r}, not {settings[name]!r}; give the same, or "
                "another folder"
            )
        (out / "tokenizer.json").unlink(missing_ok=True)  # of a command that failed and was mended
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise DataError(f"--out {out} holds other files; give a new folder")
    index = new_index(settings)
    write_json(out / INDEX, index)
    return index


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second preparation out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(f"--out {folder} is being prepared by another process; wait for it") from None
    finally:
        os.close(held)
