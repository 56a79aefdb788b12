"""Text into a prepared folder, in constant memory: tokens in shards, and an index that says how far they have come.

A finished shard is never made again: the index notes after each one which document it ended in, and what the text
before it hashed to. Going on reads that text once more, to hash it and to see that it is the same, and tokenises only
what follows. The outcome is the same to the byte as that of an uninterrupted preparation.
"""

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from moe.data.shards import FORMAT, INDEX
from moe.data.sources import Source, Split
from moe.data.tokenizer import DocumentEncoder
from moe.data.tokens import Tally
from moe.errors import DataError
from moe.rundir import write_json

__all__ = ["SHARD_TOKENS", "SPLITS", "fill", "new_index", "progress"]

SHARD_TOKENS = 1 << 28  # 512 MiB of two-byte ids
SPLITS: tuple[Split, ...] = ("validation", "train")


def new_index(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The index of a folder without shards. `settings` say how it is made, `shard_tokens` among them."""
    nothing = {"documents": 0, "tokens_of_next": 0, "text_sha256": Tally("").sha256}
    begun: dict[str, Any] = {split: {"shards": [], **nothing} for split in SPLITS}
    return {"complete": False, "format": FORMAT, "settings": dict(settings), **begun}


def fill(sources: Sequence[Source], encoder: DocumentEncoder, out: Path, index: dict[str, Any]) -> None:
    """Write into `out` what `index` lacks of the sources, one after another; at the end it is complete.

    Raises DataError when the text cannot be read or is not the one begun with, OSError when `out` cannot be written.
    """
    index |= {
        "dtype": encoder.dtype.str,
        "tokenizer_sha256": encoder.sha256,
        "end_token": encoder.end_token,
        "vocab_size": encoder.size,
    }
    for split in SPLITS:
        if "sha256" not in index[split]:
            _write_split(sources, split, encoder, out, index)
    index["complete"] = True
    write_json(out / INDEX, index)


def progress(what: str) -> "tqdm[Any]":
    """A bar of bytes on stderr, after a second; where stderr is a file, a line now and then."""
    interval = 0.5 if sys.stderr.isatty() else 15
    return tqdm(unit="B", unit_scale=True, desc=what, mininterval=interval, delay=1, dynamic_ncols=True)


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
    with progress(f"{tally.name} {split}") as bar:
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
