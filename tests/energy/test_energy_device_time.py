"""From when on a device is held: process start, the scheduler's time before it, and the segment before."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe.energy import fold_ledgers, read_ledger

JOB_AGE_S = 1000


@pytest.fixture
def slurm():
    """The environment of a SLURM job that was given its nodes a thousand seconds ago, in its first step."""
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_START_TIME": str(int(time.time()) - JOB_AGE_S)}


def meter_once(node, ledger: Path, **env: str) -> float:
    """Write one segment from a process of its own; returns the seconds it bills."""
    node.run(
        f"""
        import time
        time.sleep(0.3)
        from moe.energy import EnergyMeter
        with EnergyMeter({str(ledger)!r}, declared_power_w=10):
            pass
        """,
        **env,
    )
    return fold_ledgers([ledger]).segments[-1].elapsed_s


def test_device_time_begins_with_the_process(node, tmp_path):
    """Imports are device time; a second meter in the same process does not count them again."""
    code = f"""
        import time
        time.sleep(0.5)
        from moe.energy import EnergyMeter
        for name in "ab":
            with EnergyMeter({str(tmp_path)!r} + "/" + name, declared_power_w=10):
                pass
    """
    node.run(code)
    first, second = fold_ledgers([tmp_path / "a"]), fold_ledgers([tmp_path / "b"])
    assert first.phases["startup"].elapsed_s > 0.5
    assert first.total.device_hours * 3600 > 0.5
    assert first.total.coverage < 0.5
    assert second.phases["startup"].elapsed_s < 0.5


def test_what_the_scheduler_held_before_python_is_billed_in_the_first_step_alone(node, tmp_path, slurm):
    """An earlier step held the devices before a later one; a job that does not say who it is bills nothing."""
    assert JOB_AGE_S <= meter_once(node, tmp_path / "a", **slurm) < JOB_AGE_S + 100
    assert meter_once(node, tmp_path / "b", **slurm | {"SLURM_STEP_ID": "1"}) < 100
    assert meter_once(node, tmp_path / "c", **slurm | {"SLURM_JOB_ID": ""}) < 100


def test_the_time_the_scheduler_held_is_billed_once_for_all_programs_of_a_step(node, tmp_path, slurm):
    """Two runs one after the other in one step: the second was not what held the devices before the first."""
    assert meter_once(node, tmp_path / "a", **slurm) >= JOB_AGE_S
    assert meter_once(node, tmp_path / "b", **slurm) < 100
    assert meter_once(node, tmp_path / "c", **slurm | {"SLURM_JOB_ID": "8"}) >= JOB_AGE_S


def test_the_time_the_scheduler_held_is_billed_once_for_all_segments_of_a_ledger(node, tmp_path, slurm):
    """A restart bills from its own process on, in the same job and in the next; so does who follows it in the step."""
    assert meter_once(node, tmp_path / "a", **slurm) >= JOB_AGE_S
    assert meter_once(node, tmp_path / "a", **slurm) < 100
    assert meter_once(node, tmp_path / "a", **slurm | {"SLURM_JOB_ID": "8"}) < 100
    assert meter_once(node, tmp_path / "b", **slurm | {"SLURM_JOB_ID": "8"}) < 100


def test_a_segment_never_begins_before_the_end_of_the_one_before(node, tmp_path):
    """A process that started while the run before it still wrote bills nothing twice."""
    path = tmp_path / "ledger.jsonl"
    code = f"""
        import sys
        print("up", flush=True)
        sys.stdin.readline()
        from moe.energy import EnergyMeter
        with EnergyMeter({str(path)!r}, declared_power_w=10):
            pass
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=node.env, text=True, **streams) as waiting:
        assert waiting.stdout.readline() == "up\n"
        meter_once(node, path)
        waiting.communicate("go\n", timeout=60)
    headers = [record for record in read_ledger(path) if record["kind"] == "segment"]
    end = next(record for record in read_ledger(path) if record["kind"] == "end")
    assert headers[1]["started_boottime_ns"] == end["boottime_ns"]
