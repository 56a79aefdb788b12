"""Which host a process is on decides which of the run's ledgers it writes."""

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
