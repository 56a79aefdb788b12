"""The clocks of a ledger: one that also runs while the machine sleeps, and one that people read.

Durations come from CLOCK_BOOTTIME (nanoseconds since boot, never stepped, counts suspend); UTC is kept beside it for
people and for lining up the nodes of one run, never for a duration.
"""

import os
import time
from datetime import UTC, datetime
from pathlib import Path

from moe.energy.locks import claim_once

__all__ = ["boot_id", "boottime_ns", "device_time_start_ns", "parse_utc_ns", "utc_now"]

# CLOCK_BOOTTIME exists on Linux alone; elsewhere the monotonic clock, which may stop while the machine sleeps
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boottime_ns() -> int:
    """Nanoseconds since boot."""
    return time.clock_gettime_ns(_CLOCK)


def utc_now() -> str:
    """The time of day as `2026-01-31T12:00:00.000000Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_utc_ns(text: str) -> int:
    """Nanoseconds since 1970 of a time written by `utc_now` (microsecond grain)."""
    moment = datetime.fromisoformat(text)
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000


def boot_id() -> str:
    """The kernel's identifier of this boot; empty where the system has none, and then no two boots compare equal."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_start_ns() -> int:
    """Start of this process on the boottime clock (10 ms grain), or now where /proc does not tell."""
    now = boottime_ns()
    try:
        # the command name may hold spaces and brackets: fields are counted after the last one; starttime is field 22
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])
        start = ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return min(start, now)


def device_time_start_ns(*, new_ledger: bool) -> int:
    """When the devices of this process began to be held, on the boottime clock.

    That is the start of the process, or the start of the SLURM job where the time before Python started is surely this
    program's: in the job's first step, for the first metered program of it on this node, as its ledger is begun. A
    later program of the step, or a later segment of the ledger, would bill the same hour again.
    """
    start = _process_start_ns()
    job, job_start = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_START_TIME", "")
    if os.environ.get("SLURM_STEP_ID") != "0" or not job or not job_start.isdigit():
        return start
    # claimed by a later segment too: whatever comes after it in this step, the time before was not its own
    if not claim_once(f"slurm-{job}-0-{job_start}") or not new_ledger:
        return start
    held_ns = time.time_ns() - int(job_start) * 10**9
    return min(start, max(0, boottime_ns() - held_ns))
