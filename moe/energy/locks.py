"""One writer per ledger, one reader per device: advisory locks that die with their process; and claims that stay.

POSIX record locks, because they also hold on network file systems and a forked data worker that outlives its parent
does not inherit them. They do not conflict within a process and vanish when the process closes any descriptor of the
file, so the lock is a file of its own and a registry covers the process itself.
"""

import fcntl
import os
import struct
import tempfile
from pathlib import Path

from moe.errors import LedgerError

__all__ = ["Lock", "claim_once", "device_reader", "is_locked", "lock_device", "lock_ledger"]

_held: set[str] = set()
_FLOCK = "hhqqi0q"  # Linux's struct flock on 64-bit machines: type, whence, start, length, pid


class Lock:
    """A held lock; `release` gives it back."""

    def __init__(self, key: str, fd: int) -> None:
        self._key, self._fd, self._pid = key, fd, os.getpid()

    def release(self) -> None:
        """Give the lock back; a forked child that inherited this object must not, and does not."""
        if self._key in _held and self._pid == os.getpid():
            _held.discard(self._key)
            os.close(self._fd)


def _acquire(path: Path, flags: int, mode: int) -> Lock | None:
    """The lock, or None when this or another process holds it. Raises OSError when the file cannot be opened."""
    key = os.path.realpath(path)
    if key in _held:  # opening the file again, and closing it, would drop the lock this process holds
        return None
    try:
        # without O_CREAT first: the kernel refuses O_CREAT on another user's file in a sticky folder
        fd = os.open(path, flags)
    except FileNotFoundError:
        fd = os.open(path, flags | os.O_CREAT, mode)
        os.fchmod(fd, mode)  # whatever the umask: the next user must be able to open it
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    _held.add(key)
    return Lock(key, fd)


def lock_ledger(ledger: Path) -> Lock:
    """Lock `<ledger>.lock`. LedgerError when a living meter writes this ledger, or the folder is not writable."""
    path = ledger.with_name(ledger.name + ".lock")
    try:
        lock = _acquire(path, os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LedgerError(f"ledger {ledger} cannot be locked ({error.strerror}): choose a writable folder") from None
    if lock is None:
        raise LedgerError(f"ledger {ledger} is being written by another meter: stop that run, or choose another folder")
    return lock


def is_locked(ledger: Path) -> bool:
    """Whether a living meter writes this ledger. Asks only: no lock is taken that a starting meter could run into."""
    return _holder(ledger.with_name(ledger.name + ".lock")) is not None


def device_reader(uuid: str) -> int | None:
    """Process id of the meter that reads a device on this machine (0: of another container); None when none does."""
    return _holder(_machine_file(uuid, "lock"))


def _holder(path: Path) -> int | None:
    if os.path.realpath(path) in _held:
        return os.getpid()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else int(pid)
    except OSError:
        return None
    finally:
        os.close(fd)


def lock_device(uuid: str) -> Lock | None:
    """Claim the reading of one device on this machine; None when another meter reads it.

    A lock file that cannot be opened at all (a stranger's, in a sticky folder) detects nothing and disturbs nobody: the
    claim is then granted without a lock.
    """
    try:
        return _acquire(_machine_file(uuid, "lock"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        return Lock("", -1)


def claim_once(name: str) -> bool:
    """True for the first process on this machine that asks for `name`, for ever; False where that cannot be told."""
    try:
        os.close(os.open(_machine_file(name, "claimed"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except OSError:
        return False
    return True


def _machine_file(name: str, kind: str) -> Path:
    """A file that all programs on this machine find, whoever runs them."""
    plain = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
    return Path(tempfile.gettempdir()) / f"frugal-moe-energy-{plain}.{kind}"
