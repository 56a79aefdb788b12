"""Runs any program with the meter on: signals go through to it, its exit code comes back."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from moe.energy.meter import METERED_BY, EnergyMeter
from moe.energy.phases import PHASE_FOR
from moe.energy.sources import Source, gpu_sources, select_sources, visible_gpus
from moe.errors import ConfigError

__all__ = ["HOST", "purpose_of", "run_metered", "sources_for"]

HOST = "host"  # as a device selection: this host's processors, whatever GPUs there are

_FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
LONGEST_BLOCK_S = 1.0
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


def sources_for(selection: str | None, power_w: float | None) -> list[Source]:
    """Sources for the GPUs that `selection` (written like CUDA_VISIBLE_DEVICES) or the environment makes visible.

    Without any, or with the selection "host", this host's processors. Raises ConfigError for a selection that names no
    GPU of this machine.
    """
    gpus = [] if selection == HOST else visible_gpus(selection=selection)
    if selection not in (None, HOST) and not gpus:
        raise ConfigError(f"--devices {selection} names no GPU of this machine: see `nvidia-smi -L`, or say {HOST}")
    if power_w is None and gpus:
        return gpu_sources(gpus)
    return select_sources([gpu.uuid for gpu in gpus], power_w)


def purpose_of(command: Sequence[str]) -> str:
    """What a program is for, one of `PHASE_FOR`: `moe data prepare`, however it is launched, is for data."""
    words = [Path(word).name for word in command]
    own = (words[i + 1 : i + 3] for i, word in enumerate(words) if word in ("moe", "moe.cli"))
    return "data" if ["data", "prepare"] in own else "other"


def run_metered(command: Sequence[str], ledger: Path, sources: Sequence[Source], purpose: str = "other") -> int:
    """Run `command` to its end and meter it into `ledger`. Returns its exit code, 128 + N when signal N ended it.

    `purpose` is one of `PHASE_FOR`: what `moe energy total` counts it as.

    SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on. What the terminal sends to a whole foreground
    job (Ctrl-C) has reached the program already and is not sent twice. Raises ConfigError when there is no such
    program.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]}: program not found, or not executable: check the name or give its path")
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(signum)
        elif signum not in _FROM_TERMINAL or not _in_foreground():
            child.send_signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in _FORWARDED}
    try:
        with EnergyMeter(ledger, sources=sources) as meter:
            meter.phase(PHASE_FOR[purpose])
            try:
                child = subprocess.Popen(command, env={**os.environ, METERED_BY: str(ledger.resolve())})
            except OSError as error:
                raise ConfigError(f"{command[0]}: cannot be started ({error.strerror}): check the file") from None
            for signum in early:
                child.send_signal(signum)
            code = _exit_code(child)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return code if code >= 0 else 128 - code


def _exit_code(child: "subprocess.Popen[bytes]") -> int:
    """Wait for the program's end. Python runs no signal handler in a blocking call that a signal came just before, or
    that another thread was picked for: so block for a second at most, and a signal is passed on in that time.
    """
    ended = threading.Event()

    def wait() -> None:
        child.wait()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    while not ended.wait(LONGEST_BLOCK_S):
        pass
    return child.wait()


def _in_foreground() -> bool:
    """Whether this process group is the one its terminal sends Ctrl-C to."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
