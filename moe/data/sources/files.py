"""Text, JSONL and Parquet files, alone or in a folder.

A text file is one document; each row of a JSONL (`.jsonl`, `.ndjson`) or Parquet file is one, in the field
`data.text_field`. Text and JSONL may be compressed (`.gz`, `.zst`): what a small file is unpacked to is read piece by
piece, and a document has a longest length. Rows are held out for validation evenly, counted
over all files. A folder's text files are split by file, through a hash of their relative names; a text file given alone
is cut in two by characters.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moe.data.sources.base import Source, Split, held_out
from moe.data.sources.compressed import open_bytes, plain_name, unreadable
from moe.errors import DataError

__all__ = ["Files"]

_JSONL = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
_ROWS_AT_ONCE = 256  # of a Parquet file in memory
_LONGEST = 1 << 28  # bytes of a JSONL line, characters of a compressed text


class Files(Source):
    """The file or folder at `path`. Hidden files and folders are not text. Raises DataError when it is not there."""

    def __init__(self, path: Path, text_field: str, validation_fraction: float) -> None:
        self.name, self._path = str(path), path
        self._field, self._fraction = text_field, validation_fraction
        try:
            path.stat()
        except FileNotFoundError:
            raise DataError(
                f"data.source={self.name!r} does not exist; give stdlib, a file or folder of text, JSONL or Parquet, "
                "or hf:NAME"
            ) from None
        except OSError as error:
            raise unreadable(path, error) from None
        self._alone = not path.is_dir()
        self._files = [path] if self._alone else _listed(path)
        texts = [file for file in self._files if not _has_rows(file)]
        ranked = sorted(texts, key=lambda file: hashlib.sha256(str(file.relative_to(path)).encode()).digest())
        self._held_out = set(ranked[: max(1, round(len(texts) * validation_fraction))])

    def _read(self, split: Split) -> Iterator[str]:
        number = 0
        for file in self._files:
            if _has_rows(file):
                rows = _parquet(file, self._field) if file.name.endswith(_PARQUET) else _jsonl(file, self._field)
                for text in rows:
                    if held_out(number, self._fraction) == (split == "validation"):
                        yield text
                    number += 1
            elif self._alone:
                text = _text(file)
                cut = int(len(text) * (1 - self._fraction))
                yield text[:cut] if split == "train" else text[cut:]
            elif (file in self._held_out) == (split == "validation"):
                yield _text(file)


def _listed(folder: Path) -> list[Path]:
    def give_up(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error)

    found = []
    for place, folders, names in os.walk(folder, onerror=give_up):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _has_rows(file: Path) -> bool:
    return file.name.endswith(_PARQUET) or plain_name(file).endswith(_JSONL)


def _text(file: Path) -> str:
    packed = plain_name(file) != file.name
    try:
        with open_bytes(file) as raw, io.TextIOWrapper(raw, encoding="utf-8") as text:
            whole = text.read(_LONGEST + 1 if packed else -1)
    except UnicodeDecodeError:
        raise DataError(f"data.source: {file} is not UTF-8 text; convert it or move it out of the folder") from None
    if packed and len(whole) > _LONGEST:
        raise DataError(
            f"data.source: {file} holds more than {_LONGEST >> 20} MiB of text, and a file is one document; decompress "
            "it, or cut it into several"
        )
    return whole


def _jsonl(file: Path, field: str) -> Iterator[str]:
    """The field of each line; blank lines count for nothing."""
    with open_bytes(file) as lines:
        for number, line in enumerate(iter(partial(lines.readline, _LONGEST + 1), b""), start=1):
            if len(line) > _LONGEST:
                where = f"{file} line {number}"
                raise DataError(
                    f"data.source: {where} is longer than {_LONGEST >> 20} MiB; cut its text into several rows"
                )
            if line.strip():
                yield _field_of(line, field, f"{file} line {number}")


def _field_of(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"data.source: {where} is not UTF-8 text; convert the file") from None
    except ValueError as error:
        raise DataError(f"data.source: {where} is not JSON ({error}); a JSONL file has one object a line") from None
    text = row.get(field, 0) if isinstance(row, dict) else 0
    if text is not None and not isinstance(text, str):
        known = f"; it has {', '.join(map(repr, row))}" if isinstance(row, dict) else ""
        raise DataError(f"data.source: {where} has no text in the field data.text_field={field!r}{known}")
    return text or ""


def _parquet(file: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"data.source: {file} needs pyarrow; pip install 'frugal-moe[data]'") from None
    try:
        with parquet.ParquetFile(file) as table:
            columns: dict[str, Any] = {column.name: column.type for column in table.schema_arrow}
            kind = columns.get(field)
            if kind is None or not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                known = ", ".join(map(repr, columns))
                raise DataError(
                    f"data.source: {file} has no column of text named data.text_field={field!r}; it has {known}"
                )
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[field]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except arrow.ArrowInvalid as error:
        raise DataError(f"data.source: {file} is not a whole Parquet file ({str(error).splitlines()[0]})") from None
    except OSError as error:
        raise unreadable(file, error) from None
