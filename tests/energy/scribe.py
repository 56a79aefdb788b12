"""Ledgers written by hand: times in seconds after boot, readings in millijoules."""

import socket
from pathlib import Path

from moe.energy.ledger import LedgerWriter

S = 10**9
A, B = "GPU-a", "GPU-b"


class Scribe:
    """Writes one segment with times in seconds after boot."""

    def __init__(
        self, path: Path, start_s: float, *, devices=(A,), source="counter", resumed=0, boot="boot-1", seen=1.0
    ) -> None:
        self.writer = LedgerWriter(path)
        described = [
            {
                "uuid": uuid,
                "name": "fake",
                "kind": "gpu",
                "source": source,
                "scope": "gpu",
                "band": 0.05,
                "tick_s": 0.1,
                "seen": seen,
                "p_max_w": 700.0,
                "note": None,
            }
            for uuid in devices
        ]
        self.add(
            "segment",
            start_s,
            boot_id=boot,
            host=socket.gethostname(),
            pid=1,
            started_boottime_ns=round(start_s * S),
            interval_s=1.0,
            flush_s=5.0,
            resumed_step=resumed,
            resumed_tokens=0,
            devices=described,
        )

    def add(self, kind: str, at_s: float, **fields) -> None:
        self.writer.append(kind, at_ns=round(at_s * S), **fields)

    def read(self, at_s: float, energy_mj: int, device: str = A) -> None:
        self.add("reading", at_s, device=device, energy_mj=energy_mj)

    def mark(self, at_s: float, step: int | None = None, **phase_s: float) -> None:
        self.add("mark", at_s, phase="idle", step=step, tokens=None, phase_s=phase_s)

    def end(self, at_s: float) -> None:
        self.add("end", at_s, reason="stopped")
        self.close()

    def close(self) -> None:
        self.writer.close()
