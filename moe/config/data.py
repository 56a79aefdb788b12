"""The section `data`: what text is trained on."""

from dataclasses import dataclass
from typing import ClassVar

from moe.config.fields import Section, setting

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What text is trained on, and how it becomes tokens."""

    section_name: ClassVar[str] = "data"

    source: str = setting(
        "stdlib",
        doc="stdlib: Python's own standard library; a file or folder of text, JSONL or Parquet; a folder of `moe data "
        "prepare`; hf:NAME[@REVISION][:CONFIG]; or several of these, separated by commas, mixed by data.weights",
    )
    weights: tuple[float, ...] = setting((), above=0, doc="share of the sequences from each source, in any unit")
    text_field: str = setting("text", doc="field or column that holds the text of a JSONL, Parquet or hf: row")
    streaming: bool = setting(False, doc="read sources as training goes on, in their own order, and keep nothing")
    shuffle_buffer: int = setting(
        0, at_least=0, doc="streaming: shuffle so many documents at a time; 0 for the source's own order"
    )
    tokenizer: str | None = setting(
        None,
        doc="a tokenizer.json or a folder with one; none: trained on the text, with model.vocab_size tokens, or that "
        "of the prepared folders",
    )
    tokenizer_documents: int = setting(
        100_000, at_least=1, doc="the tokenizer is trained on so many first documents of each source"
    )
    end_token: str | None = setting(
        None, doc="the tokenizer's token that ends a document; none: <|endoftext|>, or the one it names itself"
    )
    validation_fraction: float = setting(
        0.05, above=0, below=1, doc="share of the documents kept for validation (stdlib keeps its own fixed list)"
    )
    validation_documents: int = setting(
        1000, at_least=1, doc="streaming: so many first documents of the validation split are evaluated"
    )
    mask_documents: bool = setting(
        False, doc="tokens attend to their own document alone; false as DeepSeek-V3, which packs without a mask"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            self.fail("source", "names no source; try data.source=stdlib")
        if len(self.weights) != len(self.sources) and (self.weights or len(self.sources) > 1):
            self.fail("weights", f"must give one number for each of the {len(self.sources)} sources of data.source")
        if self.shuffle_buffer and not self.streaming:
            self.fail("shuffle_buffer", "needs data.streaming=true; without it all sequences are shuffled anyway")

    @property
    def sources(self) -> tuple[str, ...]:
        """The words of `source`, one a source."""
        return tuple(word.strip() for word in self.source.split(",") if word.strip())
