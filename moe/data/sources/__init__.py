"""Where text comes from: one kind of source a file, and the words of data.source that name them."""

from pathlib import Path

from moe.config import DataConfig
from moe.data.sources.base import DocumentStream, Source, Split
from moe.data.sources.files import Files
from moe.data.sources.hugging_face import HuggingFace
from moe.data.sources.standard_library import StandardLibrary

__all__ = ["DocumentStream", "Source", "Split", "open_source"]


def open_source(word: str, config: DataConfig) -> Source:
    """The source that one word of data.source names. Raises DataError when it is not there."""
    if word == "stdlib":
        return StandardLibrary()
    if word.startswith("hf:"):
        return HuggingFace(
            word,
            config.text_field,
            config.validation_fraction,
            streaming=config.streaming,
            validation_documents=config.validation_documents,
        )
    return Files(Path(word), config.text_field, config.validation_fraction)
