"""The same surroundings for every test: no network, no user settings, a fixed number of threads.

The environment is set when this file loads, before torch or wandb are imported, so that child processes have it too.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

_HF_HOME = tempfile.TemporaryDirectory(
    prefix="frugal-moe-tests-"
)  # so that no `accelerate config` of the user's is read

os.environ.update(WANDB_MODE="offline", HF_HUB_OFFLINE="1", HF_HOME=_HF_HOME.name)
os.environ.setdefault("OMP_NUM_THREADS", "2")  # sums in the same order, and the same speed, on every machine
for _name in list(os.environ):
    # What a launcher, a meter around us or a login left behind would change what is tested.
    launcher = _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if launcher or _name.startswith(("ACCELERATE_", "SLURM_")) or _name in ("MOE_LEDGER", "WANDB_API_KEY"):
        del os.environ[_name]


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A connection that would leave this machine raises; loopback and Unix sockets work."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to connect to {address[0]!r}; tests run without a network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked)
        yield
