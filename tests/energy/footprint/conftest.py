"""Ledgers whose every joule is known, in seconds after midnight UTC of 1 January 2025."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moe.energy import Fold, fold_ledgers
from moe.energy.ledger import LedgerWriter

MIDNIGHT = datetime(2025, 1, 1, tzinfo=UTC)
H100 = "NVIDIA H100 80GB HBM3"


class Segment:
    """One segment of a ledger; the boot was at midnight. A device's band is 5 % and nothing else: its tick is 0 s."""

    def __init__(
        self,
        path: Path,
        start_s: float = 0,
        *,
        devices: tuple[str, ...] = ("GPU-a",),
        name: str = H100,
        kind: str = "gpu",
        source: str = "counter",
        resumed_step: int = 0,
    ) -> None:
        self.writer = LedgerWriter(path)
        described = [
            {
                "uuid": uuid,
                "name": name,
                "kind": kind,
                "source": source,
                "scope": "gpu" if kind == "gpu" else "node",
                "band": 0.05,
                "tick_s": 0.0,
                "p_max_w": 700.0,
                "note": None,
            }
            for uuid in devices
        ]
        self.add(
            "segment",
            start_s,
            boot_id="boot",
            host="node",
            pid=1,
            started_boottime_ns=round(start_s * 1e9),
            interval_s=1.0,
            flush_s=5.0,
            resumed_step=resumed_step,
            resumed_tokens=0,
            devices=described,
        )

    def add(self, kind: str, at_s: float, **fields: object) -> None:
        utc = (MIDNIGHT + timedelta(seconds=at_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.writer.append(kind, at_ns=round(at_s * 1e9), utc=utc, **fields)

    def read(self, at_s: float, joules: float, device: str = "GPU-a") -> None:
        self.add("reading", at_s, device=device, energy_mj=round(joules * 1000))

    def mark(self, at_s: float, tokens: int) -> None:
        self.add("mark", at_s, phase="idle", step=1, tokens=tokens, phase_s={"idle": 1.0})

    def end(self, at_s: float) -> None:
        self.add("end", at_s, reason="stopped")
        self.writer.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Fold]:
    """A run of one device that used `kwh` at an even rate over `hours`, from midnight on."""

    def make(kwh: float = 10.0, hours: float = 4.0, *, tokens: int = 0, **device: str) -> Fold:
        path = tmp_path / "ledger.jsonl"
        path.unlink(missing_ok=True)
        segment = Segment(path, **device)
        segment.read(0, 0)
        if tokens:
            segment.mark(1, tokens)
        segment.read(hours * 3600, kwh * 3.6e6)
        segment.end(hours * 3600)
        return fold_ledgers([path])

    return make


@pytest.fixture
def new_segment(tmp_path: Path) -> Callable[..., Segment]:
    """Begin a segment of `ledger.jsonl`, or of the file called `name`."""
    return lambda start_s=0, file="ledger.jsonl", **options: Segment(tmp_path / file, start_s, **options)
