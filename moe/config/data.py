"""The section `data`: what text is trained on."""

from dataclasses import dataclass
from typing import ClassVar

from moe.config.fields import Section, setting

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What text is trained on, and how it becomes tokens. The tokenizer has `model.vocab_size` tokens."""

    section_name: ClassVar[str] = "data"

    source: str = setting("stdlib", doc="stdlib: Python's own standard library; or a text file, or a folder of them")
    validation_fraction: float = setting(
        0.05, above=0, below=1, doc="share of the files kept for validation (stdlib keeps its own fixed list)"
    )
    mask_documents: bool = setting(
        False, doc="tokens attend to their own document alone; false as DeepSeek-V3, which packs without a mask"
    )
