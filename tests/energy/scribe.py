"""Ledgers written by hand: times in seconds after boot, readings in millijoules."""

import socket
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from moe.energy.ledger import LedgerWriter

S = 10**9
A, B = "GPU-a", "GPU-b"


class Scribe:
    """Writes one segment of a ledger, which begins with it at `start_s`.

    devices   their uuids; `device` is what the segment line says of all of them where it is not the usual
    resumed   the step the lineage stands at
    booted    when the machine did, which dates the lines; None leaves their dates to the clock
    header    more of the segment line, or other values
    """

    def __init__(
        self,
        path: Path,
        start_s: float,
        *,
        devices: Sequence[str] = (A,),
        resumed: int = 0,
        boot: str = "boot-1",
        booted: datetime | None = None,
        header: Mapping[str, Any] | None = None,
        **device: Any,
    ) -> None:
        self.writer, self._booted = LedgerWriter(path), booted
        described = {
            "name": "fake",
            "kind": "gpu",
            "source": "counter",
            "scope": "gpu",
            "band": 0.05,
            "tick_s": 0.1,
            "seen": 1.0,
            "p_max_w": 700.0,
            "note": None,
            **device,
        }
        begun = {
            "boot_id": boot,
            "host": socket.gethostname(),
            "pid": 1,
            "started_boottime_ns": round(start_s * S),
            "interval_s": 1.0,
            "flush_s": 5.0,
            "resumed_step": resumed,
            "resumed_tokens": 0,
            "devices": [{"uuid": uuid, **described} for uuid in devices],
        }
        self.add("segment", start_s, **begun | dict(header or {}))

    def add(self, kind: str, at_s: float, **fields: Any) -> None:
        if self._booted is not None:
            fields["utc"] = (self._booted + timedelta(seconds=at_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.writer.append(kind, at_ns=round(at_s * S), **fields)

    def read(self, at_s: float, energy_mj: float, device: str = A) -> None:
        self.add("reading", at_s, device=device, energy_mj=round(energy_mj))

    def mark(self, at_s: float, step: int | None = None, tokens: int | None = None, **phase_s: float) -> None:
        self.add("mark", at_s, phase="idle", step=step, tokens=tokens, phase_s=phase_s)

    def end(self, at_s: float) -> None:
        self.add("end", at_s, reason="stopped")
        self.close()

    def close(self) -> None:
        """Without an end: killed."""
        self.writer.close()
