"""Datasets of the Hugging Face Hub, or local ones, through `datasets`: `hf:NAME[@REVISION][:CONFIG]`.

NAME is a name on the Hub, a folder that `save_to_disk` wrote, or one that `load_dataset` can build. Training reads the
split `train`. Validation is the dataset's own split `validation` where it has one; else rows held out evenly, or, when
streaming, the first `data.validation_documents` rows, which training then leaves out.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from moe.data.sources.base import DocumentStream, Source, Split, held_out
from moe.errors import DataError

__all__ = ["HuggingFace"]

_SPELLING = re.compile(r"hf:(?P<name>[^@:]+)(@(?P<revision>[^@:]+))?(:(?P<config>[^@:]+))?")


class HuggingFace(Source):
    """The dataset that `word` spells. Raises DataError when it cannot be loaded or has no such field."""

    def __init__(
        self, word: str, text_field: str, validation_fraction: float, *, streaming: bool, validation_documents: int
    ) -> None:
        self.name, self._field, self._fraction = word, text_field, validation_fraction
        self._head = validation_documents if streaming else 0
        spelt = _SPELLING.fullmatch(word)
        if spelt is None:
            raise DataError(f"data.source={word!r} is not spelt hf:NAME, hf:NAME:CONFIG or hf:NAME@REVISION:CONFIG")
        splits = self._load(spelt["name"], spelt["revision"], spelt["config"], streaming)
        if "train" not in splits:
            raise DataError(f"data.source={word!r} has no split 'train'; it has {', '.join(map(repr, splits))}")
        self._splits = {split: self._text_column(splits[split]) for split in ("train", "validation") if split in splits}

    def _read(self, split: Split) -> Iterator[str]:
        if "validation" in self._splits:
            yield from self.texts(self._splits[split])
        elif self._head:
            rows = self.texts(self._splits["train"])
            yield from islice(rows, self._head, None) if split == "train" else islice(rows, self._head)
        else:
            for number, text in enumerate(self.texts(self._splits["train"])):
                if held_out(number, self._fraction) == (split == "validation"):
                    yield text

    def stream(self, rank: int, ranks: int) -> DocumentStream:
        return _Share(self, self._splits["train"], rank, ranks)

    def _load(self, name: str, revision: str | None, config: str | None, streaming: bool) -> Mapping[str, Any]:
        """The splits by name. What a Hub name can run is data alone: `datasets` executes no code of a repository."""
        datasets = _datasets(self.name)
        folder = Path(name)
        try:
            if (folder / "dataset_dict.json").is_file():
                splits = dict(datasets.load_from_disk(name))
            elif (folder / "state.json").is_file():
                splits = {"train": datasets.load_from_disk(name)}
            else:
                return datasets.load_dataset(name, config, revision=revision, streaming=streaming)
        except Exception as error:  # of many kinds, by what the Hub, the network or a file answered
            raise DataError(f"data.source={self.name!r} cannot be loaded: {_first_line(error)}") from None
        return {key: split.to_iterable_dataset() for key, split in splits.items()} if streaming else splits

    def _text_column(self, dataset: Any) -> Any:
        names = dataset.column_names  # None where a stream does not know before its first row
        if names is not None and self._field not in names:
            raise DataError(
                f"data.source={self.name!r} has no field data.text_field={self._field!r}; "
                f"it has {', '.join(map(repr, names))}"
            )
        return dataset if names is None else dataset.select_columns(self._field)

    def texts(self, dataset: Any) -> Iterator[str]:
        try:
            for row in dataset:
                text = row.get(self._field, 0)
                if text is not None and not isinstance(text, str):
                    raise DataError(
                        f"data.source={self.name!r} has a row without text in data.text_field={self._field!r}; "
                        f"it has {', '.join(map(repr, row))}"
                    )
                yield text or ""
        except DataError:
            raise
        except Exception as error:  # as in _load: a stream meets the network on the way
            raise DataError(f"data.source={self.name!r} cannot be read on: {_first_line(error)}") from None


class _Share:
    """A rank's share as `datasets` divides it: by files where their number allows, else by rows."""

    def __init__(self, source: HuggingFace, dataset: Any, rank: int, ranks: int) -> None:
        from datasets.distributed import split_dataset_by_node

        self._source = source
        self._dataset = split_dataset_by_node(dataset, rank=rank, world_size=ranks)
        self._beginning = self._place = self._dataset.state_dict()
        self._texts: Iterator[str] | None = None
        self.epoch = 0

    def read(self, count: int) -> list[str]:
        if self._texts is None:
            self._texts = self._source.texts(self._dataset)
        found = list(islice(self._texts, count))
        if len(found) < count:
            self.restore({"epoch": self.epoch + 1, "dataset": self._beginning})
        return found

    def state(self) -> dict[str, Any]:
        # until its first row a dataset still tells the place before load_state_dict
        place = self._place if self._texts is None else self._dataset.state_dict()
        return {"epoch": self.epoch, "dataset": place}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self._place = state["epoch"], state["dataset"]
        self._dataset.load_state_dict(self._place)
        self._texts = None


def _datasets(word: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise DataError(f"data.source={word!r} needs datasets; pip install 'frugal-moe[data]'") from None
    return datasets


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
