"""Tokens on the disk: shards of bounded size and an index that says what they hold.

    DIR/
      index.json              hashes of text and tokenizer; of each split its shards, with their tokens and sha256
      tokenizer.json          what made the tokens, with tokenizer_config.json
      train_00000.bin …       token ids, little-endian, two bytes each where the vocabulary allows, else four
      validation_00000.bin …

Shards are read with pread, not through a memory map: both use the page cache, but a file cut short under a memory map
kills the process with SIGBUS, where a short read is an error that can be told.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.data.tokenizer import DocumentEncoder
from moe.data.tokens import SourceTokens, SplitTokens, joint_sha256
from moe.errors import DataError

__all__ = ["FORMAT", "INDEX", "PreparedFolder", "ShardedTokens", "sha256_of"]

INDEX = "index.json"
FORMAT = "moe-token-shards-1"
_OPEN_FILES = 64  # of one split at once: a corpus may have more shards than a process may open


class ShardedTokens:
    """Token ids by place, read when asked for. Raises DataError where a shard is missing or has changed its size."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], dtype: np.dtype[Any]) -> None:
        self._files = [folder / shard["file"] for shard in shards]
        self._starts = [0, *accumulate(shard["tokens"] for shard in shards)]
        self._dtype = dtype
        self._open: OrderedDict[int, _File] = OrderedDict()
        for file, shard in zip(self._files, shards, strict=True):
            size, wanted = _size(file), shard["tokens"] * dtype.itemsize
            if size != wanted:
                raise _changed(file, f"has {size} bytes and should have {wanted}")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, places: slice) -> NDArray[Any]:
        start, stop, _ = places.indices(len(self))
        shard = bisect_right(self._starts, start) - 1
        parts = []
        while start < stop:
            until = min(stop, self._starts[shard + 1])
            parts.append(self._read(shard, start - self._starts[shard], until - start))
            start, shard = until, shard + 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _read(self, shard: int, first: int, count: int) -> NDArray[Any]:
        file, width = self._files[shard], self._dtype.itemsize
        try:
            if shard not in self._open:
                self._open[shard] = _File(file)
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            raw = os.pread(self._open[shard].fd, count * width, first * width)
        except OSError as error:
            raise _changed(file, f"cannot be read ({error.strerror})") from None
        if len(raw) < count * width:
            raise _changed(file, "became shorter while it was read")
        return np.frombuffer(raw, self._dtype)


class PreparedFolder:
    """A folder that `moe data prepare` has filled. Raises DataError when its index is damaged or not yet complete."""

    def __init__(self, folder: Path) -> None:
        self.name, self._folder = str(folder), folder
        self.tokenizer = folder / "tokenizer.json"
        self.index = self.index_at(folder)
        if not self.index["complete"]:
            raise DataError(
                f"data.source={self.name!r} is not prepared to its end; run the same `moe data prepare` again to go on"
            )

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether the folder is one of ours, rather than a folder of text."""
        try:
            with (folder / INDEX).open("rb") as file:
                return FORMAT.encode() in file.read(1000)
        except OSError:
            return False

    @staticmethod
    def index_at(folder: Path) -> dict[str, Any]:
        """What its index says, complete or not."""
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except ValueError as error:
            raise _changed(folder / INDEX, f"is not JSON ({error})") from None
        except OSError as error:
            raise _changed(folder / INDEX, f"cannot be read ({error.strerror})") from None
        if not isinstance(index, dict) or not index.keys() >= {"complete", "settings", "train", "validation"}:
            raise _changed(folder / INDEX, "lacks parts of an index")
        return index

    def made_with(self, encoder: DocumentEncoder) -> bool:
        """Whether its tokens are those that `encoder` makes of the same text."""
        return (self.index["tokenizer_sha256"], self.index["end_token"]) == (encoder.sha256, encoder.end_token)

    def tokens(self, *, verify: bool) -> SourceTokens:
        """Its splits. `verify` hashes every shard, a second or so a gigabyte; DataError for one that changed."""
        if verify:
            self._verify()
        dtype = np.dtype(self.index["dtype"])
        train, validation = (
            SplitTokens(
                ShardedTokens(self._folder, split["shards"], dtype), split["documents"], split["bytes"], split["sha256"]
            )
            for split in (self.index["train"], self.index["validation"])
        )
        shards = [shard["sha256"] for shard in self._shards()]
        return SourceTokens(self.name, train, validation, joint_sha256((train.sha256, validation.sha256, *shards)))

    def _verify(self) -> None:
        shards = self._shards()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found = threads.map(lambda shard: sha256_of(self._folder / shard["file"]), shards)
            for shard, sha256 in zip(shards, found, strict=True):
                if sha256 != shard["sha256"]:
                    raise _changed(self._folder / shard["file"], "is not what was prepared: its sha256 differs")

    def _shards(self) -> list[dict[str, Any]]:
        return [*self.index["train"]["shards"], *self.index["validation"]["shards"]]


class _File:
    """An open file that closes with its last user."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def sha256_of(file: Path) -> str:
    """Hash of a file. Raises DataError when it cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise _changed(file, f"cannot be read ({error.strerror})") from None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _changed(file, f"cannot be read ({error.strerror})") from None


def _changed(file: Path, what: str) -> DataError:
    return DataError(f"data.source: {file} {what}; restore it, or delete its folder and have it made again")
