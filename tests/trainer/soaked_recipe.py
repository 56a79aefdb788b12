"""The tiny recipe as a process to be killed: it holds a GPU that NVML knows, and tells what a power cut would leave.

HELD_GPU=uuid       what torch would call the device; the training itself is on the processor
FSYNCED=file        one line "size path" for each append-only file put on the disk
PACE_S=seconds      how much longer each step takes, as a larger model's would
"""

import os
import time
from pathlib import Path
from typing import Any

from tiny_recipe import RECIPE

from moe.trainer import main, metering
from moe.trainer.step import Stepper

_fsync = os.fsync
_step = Stepper.step


def _noted_fsync(fd: int) -> None:
    path, size = Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_size
    _fsync(fd)
    if path.suffix == ".jsonl":
        with open(os.environ["FSYNCED"], "a", encoding="utf-8") as file:
            file.write(f"{size} {path}\n")


def _paced_step(*args: Any, **words: Any) -> Any:
    time.sleep(float(os.environ["PACE_S"]))
    return _step(*args, **words)


if __name__ == "__main__":
    os.fsync = _noted_fsync
    Stepper.step = _paced_step
    metering.device_uuid = lambda device: os.environ["HELD_GPU"]
    main(RECIPE)
