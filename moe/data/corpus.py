"""Documents, split by file into training and validation, with a hash that names exactly this text."""

import hashlib
import importlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe.config import DataConfig
from moe.data import stdlib
from moe.errors import DataError

__all__ = ["Corpus", "load_corpus"]


@dataclass(frozen=True)
class Corpus:
    """Documents of the two splits, in a fixed order."""

    source: str
    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def train_sha256(self) -> str:
        return _digest(self.train)

    @property
    def validation_sha256(self) -> str:
        return _digest(self.validation)

    @property
    def sha256(self) -> str:
        """Hash over both splits."""
        return hashlib.sha256((self.train_sha256 + self.validation_sha256).encode()).hexdigest()


def load_corpus(config: DataConfig) -> Corpus:
    """The corpus `config.source` names. Raises DataError when it is missing, empty, or not UTF-8 text."""
    if config.source == "stdlib":
        return _standard_library()
    return _files(Path(config.source), config.validation_fraction)


def _standard_library() -> Corpus:
    topics = importlib.import_module(stdlib.PROSE_MODULE).topics
    prose = [text for _, text in sorted(topics.items())]
    every = stdlib.VALIDATION_TOPIC_EVERY
    return Corpus(
        source="stdlib",
        train=(*_sources(stdlib.TRAIN_MODULES), *(t for i, t in enumerate(prose) if i % every)),
        validation=(*_sources(stdlib.VALIDATION_MODULES), *prose[::every]),
    )


def _sources(modules: Iterable[str]) -> list[str]:
    """Source text of standard-library modules, found by path so that nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for module in modules:
        place = root.joinpath(*module.split("."))
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if not file.is_file():
            raise DataError(
                f"data.source=stdlib: this Python lacks the source of {module!r} ({file}); "
                "install the full standard library, or give data.source a folder of text files"
            )
        texts.append(file.read_text(encoding="utf-8"))
    return texts


def _files(path: Path, validation_fraction: float) -> Corpus:
    """A text file, cut in two by characters, or a folder, split by file through a hash of each file's relative name."""
    if not path.exists():
        raise DataError(f"data.source={str(path)!r} does not exist; give stdlib, a text file or a folder of them")
    if path.is_file():
        text = _read(path)
        cut = int(len(text) * (1 - validation_fraction))
        train, validation = [text[:cut]], [text[cut:]]
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        ranked = sorted(files, key=lambda file: hashlib.sha256(str(file.relative_to(path)).encode()).digest())
        held_out = set(ranked[: max(1, round(len(files) * validation_fraction))])
        train = [_read(file) for file in files if file not in held_out]
        validation = [_read(file) for file in files if file in held_out]
    for name, texts in (("training", train), ("validation", validation)):
        if not any(texts):
            raise DataError(
                f"data.source={str(path)!r} leaves the {name} split without text; give more, or longer, files"
            )
    return Corpus(source=str(path), train=tuple(filter(None, train)), validation=tuple(filter(None, validation)))


def _hidden(place: Path) -> bool:
    """Whether a file or a folder above it is hidden: a checkout's .git is not text."""
    return any(part.startswith(".") for part in place.parts)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"data.source: {file} is not UTF-8 text; convert it or move it out of the folder") from None
    except OSError as error:
        raise DataError(f"data.source: {file} cannot be read ({error.strerror})") from None


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()
