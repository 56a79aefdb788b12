"""A real corpus on every machine: source files and documentation prose of Python's own standard library."""

import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe.data.sources import stdlib_modules
from moe.data.sources.base import Source, Split
from moe.errors import DataError

__all__ = ["StandardLibrary"]


class StandardLibrary(Source):
    """Modules, then the language reference's sections. Validation has modules and sections of its own, always these."""

    name = "stdlib"

    def _read(self, split: Split) -> Iterator[str]:
        training = split == "train"
        modules = stdlib_modules.TRAIN_MODULES if training else stdlib_modules.VALIDATION_MODULES
        yield from map(_source_of, modules)
        topics = importlib.import_module(stdlib_modules.PROSE_MODULE).topics
        for number, (_, text) in enumerate(sorted(topics.items())):
            if bool(number % stdlib_modules.VALIDATION_TOPIC_EVERY) == training:
                yield text


def _source_of(module: str) -> str:
    """Source text of a standard-library module, found by path so that nothing is imported."""
    place = Path(sysconfig.get_path("stdlib")).joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not file.is_file():
        raise DataError(
            f"data.source=stdlib: this Python lacks the source of {module!r} ({file}); "
            "install the full standard library, or give data.source a folder of text files"
        )
    return file.read_text(encoding="utf-8")
