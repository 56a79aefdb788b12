"""Contestants: real processes, real answers."""

import importlib
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def contestant(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("contestant")


def counting(first: int) -> object:
    """Built once; remembers between calls."""
    seen = [first]

    def run(step: int) -> tuple[int, int]:
        if not step:
            raise ValueError("step is 0")
        seen[0] += step
        return os.getpid(), seen[0]

    return run


def test_runs_in_a_process_of_its_own(contestant: ModuleType) -> None:
    """Each keeps what it built, away from the others; what goes wrong there is told here and it goes on."""
    with contestant.Contestant(1, counting, 10) as a, contestant.Contestant(1, counting, 20) as b:
        (pid_a, first), (pid_b, _) = a(1), b(1)
        assert len({pid_a, pid_b, os.getpid()}) == 3
        assert first == 11
        with pytest.raises(RuntimeError, match="ValueError: step is 0"):
            a(0)
        assert a(2) == (pid_a, 13)
        assert b(2) == (pid_b, 23)
        os.kill(pid_b, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="ended with exit code -9"):
            b(2)
