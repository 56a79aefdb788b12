"""The section `run`: which run this is."""

from dataclasses import dataclass
from typing import ClassVar

from moe.config.fields import Section, setting

__all__ = ["RunConfig"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Which run this is."""

    section_name: ClassVar[str] = "run"

    name: str = setting(doc="folder of the run below run.directory")
    directory: str = setting("runs", doc="folder that holds the runs", may_change=True)
    seed: int = setting(0, at_least=0, at_most=2**31 - 1, doc="seed of the initial weights and of the data order")
