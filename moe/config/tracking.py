"""The section `tracking`: where metrics go besides metrics.jsonl."""

from dataclasses import dataclass
from typing import ClassVar

from moe.config.fields import Section, nearest, setting, shortened
from moe.errors import ConfigError

__all__ = ["TRACKERS", "TrackingConfig"]

TRACKERS = ("wandb", "trackio", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    section_name: ClassVar[str] = "tracking"

    trackers: tuple[str, ...] = setting(
        (),
        doc="wandb, trackio, tensorboard, several with commas, or none; without an API key wandb writes offline files",
        may_change=True,
    )
    project: str = setting("frugal-moe", doc="project the tracker files the run under", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                known = nearest(tracker, (*TRACKERS, "none"))
                raise ConfigError(f"tracking.trackers={shortened(tracker)!r} is not a tracker{known}")
