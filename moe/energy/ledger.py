"""The ledger: append-only, one JSON object a line, each line carrying the SHA-256 of the line before.

    {"v":1,"kind":"reading","segment":0,"seq":7,"utc":"…Z","boottime_ns":…,"device":"GPU-…","energy_mj":…,"prev":"…"}

kind     more fields
segment  boot_id host pid started_boottime_ns interval_s flush_s resumed_step resumed_tokens devices[]; where it applies
         metered_by (a ledger that already bills this process), second_reader[] (devices another meter reads as well),
         torn_bytes (length of a torn last line that was cut off), node_source (of node_energy_mj)
reading  device energy_mj: the counter's own value, so that a difference of any two lines is energy; once a minute also
         what `moe.energy.conditions` lists, and node_energy_mj: a counter of the whole node, the devices inside
mark     phase step tokens phase_s{}: seconds per phase since the mark before (the first: since started_boottime_ns)
gap      device reason detail: the counter fell or its boot ended, so the joules up to the next reading are not known
         (reset; device null: a whole segment's end), or reads began to fail (lost)
end      reason: the meter was stopped; a segment without one was lost

`prev` of the first line is empty. The chain finds damage and edits; it is no signature.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.energy.clock import boottime_ns, utc_now
from moe.errors import LedgerError

__all__ = ["MEND", "VERSION", "LedgerWriter", "Record", "read_ledger"]

VERSION = 1
MEND = "restore it from a copy, or move it away: the cost so far is then not counted"
KINDS = ("segment", "reading", "mark", "gap", "end")

Record = dict[str, Any]


# made once: json.dumps with these settings would make an encoder for every line
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def read_ledger(path: Path, on_torn: Callable[[int], None] | None = None) -> Iterator[Record]:
    """The ledger's records in order, each checked against the chain.

    A last line that a kill or power cut left unfinished is skipped and its length in bytes passed to `on_torn`.
    Raises LedgerError with the line number for any other damage.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise LedgerError(f"ledger {path} cannot be read: {error.strerror}") from None
    prev, number = "", 0
    with file:
        for line in file:
            number += 1
            record = _parse(line)
            if record is None:
                rest = len(line) + sum(map(len, file))
                if rest > len(line):
                    raise LedgerError(f"ledger {path} line {number} is not a ledger record: {MEND}")
                if on_torn is not None:
                    on_torn(rest)
                return
            if record["prev"] != prev:
                where = f"line {number - 1} does not match the hash in line {number}" if prev else "line 1 is missing"
                raise LedgerError(f"ledger {path} was altered: {where}; {MEND}")
            if record["v"] != VERSION:
                raise LedgerError(
                    f"ledger {path} line {number} has version {record['v']}: this program reads {VERSION}"
                )
            yield record
            prev = _hash(line[:-1])


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"v", "prev"} <= record.keys():
        return None
    if record["v"] != VERSION:  # its kinds and fields are its own: no damage, whatever they are
        return record
    whole = {"segment", "seq", "utc", "boottime_ns"} <= record.keys()
    return record if whole and record.get("kind") in KINDS else None


class LedgerWriter:
    """Appends to a ledger; `path=None` keeps count and writes nothing.

    `on_record` sees each record, those read at opening and those appended. Opening checks what is there, cuts a torn
    last line off and goes on from the last whole one; it raises LedgerError when the ledger is damaged or cannot be
    written. After that nothing raises: lines that a full disk refuses wait in memory (about 300 bytes each), stderr
    says so once, and every later append tries again.
    """

    def __init__(self, path: Path | None, on_record: Callable[[Record], None] | None = None) -> None:
        self.path = path
        self.segment = 0
        self.torn_bytes = 0
        self.failure: str | None = None
        self._seq = 0
        self._prev = ""
        self._pending: list[bytes] = []
        self._lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._on_record = on_record
        self._fd = -1
        self._size = 0
        self._unsynced = False
        if path is not None:
            self._open(path)

    @property
    def last_seq(self) -> int:
        """The seq of the last record appended."""
        return self._seq - 1

    def _open(self, path: Path) -> None:
        last: Record | None = None
        if path.exists():
            for record in read_ledger(path, on_torn=lambda size: setattr(self, "torn_bytes", size)):
                last = record
                if self._on_record is not None:
                    self._on_record(record)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = os.fstat(self._fd).st_size - self.torn_bytes
            if self.torn_bytes:
                os.ftruncate(self._fd, self._size)
        except OSError as error:
            raise LedgerError(f"ledger {path} cannot be written ({error.strerror}): choose a writable folder") from None
        if last is not None:
            self.segment = last["segment"] + 1
            self._seq = last["seq"] + 1
            self._prev = _hash(_last_line(self._fd, self._size))

    def append(self, kind: str, at_ns: int | None = None, **fields: Any) -> int:
        """Add one record and hand it to the operating system; returns its seq. `at_ns`: boottime, default now."""
        return self.append_all([(kind, at_ns, fields)])

    def append_all(self, records: Iterable[tuple[str, int | None, Mapping[str, Any]]]) -> int:
        """Add records (kind, at_ns, fields) with one write; fields hold the `utc` of those that had to wait."""
        with self._lock:
            for kind, at_ns, fields in records:
                record = {
                    "v": VERSION,
                    "kind": kind,
                    "segment": self.segment,
                    "seq": self._seq,
                    "utc": utc_now(),
                    "boottime_ns": boottime_ns() if at_ns is None else at_ns,
                    **fields,
                    "prev": self._prev,
                }
                line = _encode(record).encode()
                self._seq += 1
                self._prev = _hash(line)
                if self.path is not None:
                    self._pending.append(line + b"\n")
                if self._on_record is not None:
                    self._on_record(record)
            if self._pending:
                self._write_pending()
            return self._seq - 1

    def _write_pending(self) -> None:
        data = b"".join(self._pending)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            self._undo_partial_write()
            self._complain(error)
            return
        self._size += len(data)
        self._pending.clear()
        self._unsynced = True
        if self.failure is not None:
            print(f"moe.energy: ledger {self.path} is written again, nothing was lost", file=sys.stderr)
            self.failure = None

    def _undo_partial_write(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if self.failure is None:
            print(
                f"moe.energy: ledger {self.path} cannot be written ({error.strerror}): kept in memory", file=sys.stderr
            )
        self.failure = error.strerror

    def sync(self) -> None:
        """fsync what was appended, outside the lock: a slow disk holds up nobody who only appends.

        Who comes while another thread's fsync is under way waits for it: a checkpoint names a line that is on the disk.
        """
        with self._sync_lock:
            if not self._unsynced:
                return
            self._unsynced = False
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._unsynced = True
                self._complain(error)

    def close(self) -> None:
        """Write and fsync what is left; says on stderr how many lines a full disk cost."""
        if self.path is None or self._fd < 0:
            return
        with self._lock:
            if self._pending:
                self._write_pending()
        self.sync()
        if self._pending:
            print(f"moe.energy: ledger {self.path} lost its last {len(self._pending)} lines", file=sys.stderr)
        os.close(self._fd)
        self._fd = -1


def _last_line(fd: int, size: int) -> bytes:
    """The last whole line of a file of `size` bytes, without its newline."""
    chunk = 1 << 12
    while True:
        start = max(0, size - chunk)
        lines = os.pread(fd, size - start, start)[:-1].split(b"\n")
        if len(lines) > 1 or start == 0:
            return lines[-1]
        chunk *= 2
