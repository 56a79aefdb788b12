"""scripts/quickstart for real: a fresh folder, a fresh environment, both runs, the comparison, and a second call."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.soak
def test_quickstart_fast(tmp_path: Path) -> None:
    """--fast ends in a table, a page and the same as JSON; the second call reuses everything and takes seconds."""
    house = tmp_path / "a house"
    shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*_cache", "__pycache__"))
    command = [str(house / "scripts" / "quickstart"), "--fast"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert first.returncode == 0, first.stderr
    assert "corpus sha256 " in first.stderr
    assert "step/s" in first.stderr  # a progress bar
    assert "runs/quickstart/report.html" in first.stdout.splitlines()[-1]
    comparison = json.loads((house / "runs/quickstart/compare.json").read_text())
    assert [run["name"] for run in comparison["runs"]] == ["quickstart_fast_moe", "quickstart_fast_dense"]
    assert "<html" in (house / "runs/quickstart/report.html").read_text()[:500]
    trained_s = sum(run["device_hours"] * 3600 for run in comparison["runs"])
    assert trained_s < 90
    start = time.monotonic()
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("is complete at step") == 2
    assert time.monotonic() - start < 60
