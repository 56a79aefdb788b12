"""Which host a process is on decides which of the run's ledgers it writes; and a barrier that outlasts hours."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe.parallel import ranks


@pytest.mark.parametrize(
    ("told", "node"),
    [({}, 0), ({"GROUP_RANK": "2"}, 2), ({"CROSS_RANK": "1"}, 1), ({"NODE_RANK": "3"}, 3)],
    ids=["no launcher", "torch's launcher", "DeepSpeed's launcher", "by hand"],
)
def test_the_launcher_says_which_host(told: dict[str, str], node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launcher in its own word; else there is one host."""
    for name in ("GROUP_RANK", "CROSS_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert ranks.node() == node


WAITING = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from moe.parallel import ranks

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
(folder / str(rank)).touch()
while len(list(folder.iterdir())) < 2:  # the imports are over on both: four seconds are enough to meet
    time.sleep(0.01)
dist.init_process_group("gloo", f"file://{folder}.meeting", timedelta(seconds=4), world_size=2, rank=rank)
wait = ranks.patient_barrier()
if rank == 0:
    time.sleep(6)
began = time.monotonic()
(dist.barrier if sys.argv[3] == "barrier" else wait)()
print("waited" if time.monotonic() - began > 4.5 else "came last")
"""


@pytest.mark.parametrize(("kind", "said"), [("patient", {"waited", "came last"}), ("barrier", {""})])
def test_a_patient_barrier_outlasts_the_groups_timeout(tmp_path: Path, kind: str, said: set[str]) -> None:
    """The first rank comes after one and a half times the timeout: the other waits, or gives up at a usual barrier."""
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    both = [subprocess.Popen([*command, str(rank), kind], stdout=-1, stderr=-1, text=True) for rank in (0, 1)]
    assert {process.communicate(timeout=60)[0].strip() for process in both} == said
