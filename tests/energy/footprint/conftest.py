"""Ledgers whose every joule is known, in seconds after midnight UTC of 1 January 2025."""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from moe.energy import Fold, fold_ledgers
from tests.energy.scribe import Scribe

# the boot was at midnight; a device's band is 5 % and nothing else, for its counter has no tick
segment_of = partial(Scribe, booted=datetime(2025, 1, 1, tzinfo=UTC), name="NVIDIA H100 80GB HBM3", tick_s=0.0)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Fold]:
    """A run of one device that used `kwh` at an even rate over `hours`, from midnight on."""

    def make(kwh: float = 10.0, hours: float = 4.0, *, tokens: int = 0, **device: str) -> Fold:
        path = tmp_path / "ledger.jsonl"
        path.unlink(missing_ok=True)
        segment = segment_of(path, 0, **device)
        segment.read(0, 0)
        if tokens:
            segment.mark(1, step=1, tokens=tokens, idle=1.0)
        segment.read(hours * 3600, kwh * 3.6e9)
        segment.end(hours * 3600)
        return fold_ledgers([path])

    return make


@pytest.fixture
def new_segment(tmp_path: Path) -> Callable[..., Scribe]:
    """Begin a segment of `ledger.jsonl`, or of the file called `name`."""
    return lambda start_s=0, file="ledger.jsonl", **options: segment_of(tmp_path / file, start_s, **options)
