"""Tokenising once, ahead of training: sources into a folder of shards, in constant memory, resumable after a kill.

A finished shard is never made again: the index notes after each one which document it ended in, and what the text
before it hashed to. Going on reads that text once more, to hash it and to see that it is the same, and tokenises only
what follows. The outcome is the same to the byte as that of an uninterrupted preparation.
"""

import fcntl
import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from moe.config import DataConfig
from moe.data.shards import FORMAT, INDEX, PreparedFolder, sha256_of
from moe.data.sources import Source, Split, open_source
from moe.data.tokenizer import DocumentEncoder, copy_tokenizer, tokenizer_file, train_tokenizer
from moe.data.tokens import Tally
from moe.errors import DataError
from moe.rundir import write_json

__all__ = ["SHARD_TOKENS", "prepare"]

SHARD_TOKENS = 1 << 28  # 512 MiB of two-byte ids


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
    encoder = DocumentEncoder(tokenizer)
    index |= {
        "dtype": encoder.dtype.str,
        "tokenizer_sha256": encoder.sha256,
        "end_token": encoder.end_token,
        "vocab_size": encoder.size,
    }
    for split in ("validation", "train"):
        if "sha256" not in index[split]:
            _write_split(sources, split, encoder, out, index)
    index["complete"] = True
    write_json(out / INDEX, index)
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
    nothing = {"documents": 0, "tokens_of_next": 0, "text_sha256": Tally("").sha256}
    begun = {split: {"shards": [], **nothing} for split in ("train", "validation")}
    index = {"complete": False, "format": FORMAT, "settings": settings, **begun}
    write_json(out / INDEX, index)
    return index


def _write_split(
    sources: Sequence[Source], split: Split, encoder: DocumentEncoder, out: Path, index: dict[str, Any]
) -> None:
    """Write a split's shards from where the index says it stands, and its facts at the end."""
    begun = index[split]
    tally = Tally(", ".join(source.name for source in sources))
    before: deque[str] = deque()  # hash of the text before each document that is being encoded

    def passing(documents: Iterator[str]) -> Iterator[str]:
        for text in documents:
            before.append(tally.sha256)
            yield from tally.through([text])
            bar.update(len(text.encode()))

    documents = chain.from_iterable(source.documents(split) for source in sources)
    interval = 0.5 if sys.stderr.isatty() else 15
    with tqdm(unit="B", unit_scale=True, desc=f"{out.name} {split}", mininterval=interval, dynamic_ncols=True) as bar:
        for _ in passing(islice(documents, begun["documents"])):
            before.clear()
        if tally.sha256 != begun["text_sha256"]:
            raise DataError(
                f"the text of {tally.name} has changed since --out {out} was begun; restore it, or give another folder"
            )
        with _ShardWriter(out, split, begun["shards"], encoder.dtype, index["settings"]["shard_tokens"]) as writer:
            skipped = begun["tokens_of_next"]
            for number, ids in enumerate(encoder.encode(passing(documents)), start=begun["documents"]):
                text_sha256 = before.popleft()
                for used in writer.write(ids, skipped):
                    begun |= {"documents": number, "tokens_of_next": used, "text_sha256": text_sha256}
                    write_json(out / INDEX, index)
                skipped = 0
            writer.finish()
    index[split] = {
        "shards": begun["shards"],
        "documents": tally.documents,
        "bytes": tally.bytes,
        "tokens": sum(shard["tokens"] for shard in begun["shards"]),
        "sha256": tally.sha256,
    }
    write_json(out / INDEX, index)


class _ShardWriter:
    """Fills one shard after another under a hidden name and lists it in `shards` once it is whole and on the disk."""

    def __init__(
        self, out: Path, split: Split, shards: list[dict[str, Any]], dtype: np.dtype[Any], shard_tokens: int
    ) -> None:
        self._out, self._split, self._shards = out, split, shards
        self._dtype, self._limit = dtype, shard_tokens
        self._tokens = 0
        self._begin()

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def write(self, ids: NDArray[Any], start: int) -> Iterator[int]:
        """Write a document's ids from `start` on; yields how many of them are written whenever a shard is whole."""
        while start < len(ids):
            part = ids[start : start + self._limit - self._tokens]
            raw = part.astype(self._dtype, copy=False).tobytes()
            self._file.write(raw)
            self._digest.update(raw)
            self._tokens += len(part)
            start += len(part)
            if self._tokens == self._limit:
                self.finish()
                yield start
                self._begin()

    def finish(self) -> None:
        """Make what is written the next shard; nothing where nothing is."""
        if self._tokens == 0:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._aside.rename(self._out / self._name)
        self._shards.append({"file": self._name, "tokens": self._tokens, "sha256": self._digest.hexdigest()})
        self._tokens = 0

    def _begin(self) -> None:
        self._name = f"{self._split}_{len(self._shards):05d}.bin"
        self._aside = self._out / f".{self._name}"
        self._file = self._aside.open("wb")
        self._digest = hashlib.sha256()
        self._tokens = 0


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
