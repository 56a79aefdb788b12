"""Files as bytes, decompressed where their names end in `.gz` or `.zst`."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.errors import DataError

__all__ = ["open_bytes", "plain_name", "unreadable"]

_SUFFIXES = (".gz", ".zst")
_CHUNK = 1 << 10  # compressed bytes taken at once: of each 4 may come a block of 128 KiB, so 32 MiB at most
_BUFFER = 1 << 17
_LARGEST_WINDOW = 1 << 31  # as `zstd --long=31` needs; by default zstandard refuses more than 128 MiB


def plain_name(file: Path) -> str:
    """The file's name as it is when decompressed."""
    return file.stem if file.name.endswith(_SUFFIXES) else file.name


@contextmanager
def open_bytes(file: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The file's bytes, decompressed as they are read. Raises DataError where they cannot be read, or are damaged."""
    try:
        with _opened(file) as raw:
            yield raw
    except (EOFError, zlib.error) as error:
        raise DataError(f"data.source: {file} is damaged ({error}); fetch it again or move it away") from None
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> DataError:
    """What a disk's refusal is to the user."""
    return DataError(f"data.source: {file} cannot be read ({error.strerror or error}); mend that or move it away")


def _opened(file: Path) -> io.BufferedReader | gzip.GzipFile:
    if file.name.endswith(".gz"):
        return gzip.open(file)
    if file.name.endswith(".zst"):
        return io.BufferedReader(_ZstandardFile(file), _BUFFER)
    return file.open("rb")


class _ZstandardFile(io.RawIOBase):
    """A file of zstandard frames, one after another. Raises EOFError where the last is cut short or one is damaged.

    zstandard's own reader takes a file that is cut short for its end, and training would miss the rest in silence. In
    memory are the window that the frame asks for and what comes of a chunk, however small its file was packed.
    """

    def __init__(self, file: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"data.source: {file} needs zstandard; pip install 'frugal-moe[data]'") from None
        self._zstandard: Any = zstandard
        self._file = file.open("rb")
        self._frame: Any = None
        self._compressed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends within a zstandard frame")
                return 0
            self._decompress()
        part, self._plain = self._plain[: len(buffer)], self._plain[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self) -> None:
        """What is read of this frame, or the next; what follows its end stays for the one after."""
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        try:
            self._plain = memoryview(self._frame.decompress(self._compressed))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._compressed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
