"""A ledger up to one of its lines, as the beginning of another: what a branched run has in common with its trunk."""

from collections.abc import Callable
from pathlib import Path

from moe.energy.ledger import LedgerWriter, Record, read_ledger

__all__ = ["cut_ledger"]


def cut_ledger(source: Path, target: Path, belongs: Callable[[Record], bool], reason: str) -> Record | None:
    """Copy the lines of `source` up to the first that does not belong into the new file `target`, byte for byte.

    The chain of hashes goes on unbroken. A segment that is cut open gets an `end` line with `reason`, dated like the
    line before: nothing after it belongs to `target`, so nothing is missing there as after a kill. Returns the last
    line copied; None, and no file, when not even the first belongs. Raises LedgerError when a line is damaged.
    """
    last: Record | None = None
    records = read_ledger(source)
    record = next(records, None)
    with source.open("rb") as lines, target.open("xb") as copy:
        while record is not None and belongs(record):
            copy.write(lines.readline())
            last, record = record, next(records, None)
    if last is None:
        target.unlink()
    elif last["kind"] != "end":
        writer = LedgerWriter(target)
        writer.segment = last["segment"]
        writer.append("end", last["boottime_ns"], reason=reason)
        writer.close()
    return last
