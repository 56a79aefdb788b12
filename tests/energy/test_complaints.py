"""What users of energy meters complain about most, each as a test that it does not happen here.

     1  double counting by rank           a meter in every process bills the node once for each
     2  only one node seen                a multi-node run shows its first node
     3  wrong GPUs                        one of eight is allocated, all eight are billed
     4  MIG crashes                       a MIG id where an index was expected
     5  MIG over-reports                  each slice carries the whole GPU's joules
     6  silent zero                       no counter, or one that stands still: 0 kWh for the whole run
     7  counter wrap and reset            negative energy, totals that go down
     8  RAPL permission                   a guess in place of the counter, and nobody is the wiser
     9  network and location              a run put into another country because a request timed out
    10  monitor keeps a dead job alive    training failed, its process lives on
    11  monitor kills a live job          an error of the sensor ends the training
    12  lost data on interruption         a kill or a second start takes the numbers away
    13  which number is right             counter and integrated power disagree, and nothing says so
    14  measuring changes the thing       polling holds the driver's lock
    15  AMD counters stuck                a counter that stands still until the next boot

More on each is in the tests of its part: the meter and its faults (7, 10-12, 14), NVML (3-7), RAPL (7, 8), conditions
(13), AMD (15), the command line (9, 12), the fold (2).
"""

import json
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path

import pytest

from moe.energy import EnergyMeter, fold_ledgers, read_ledger, select_sources
from moe.energy.programme import RunLedgers, fold_programme
from moe.energy.sources import RaplSource
from moe.rundir import RunDir

MOE = [sys.executable, "-m", "moe.cli", "energy"]
A, B = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "ab")

PROGRAM = """
    import sys, time
    from moe.energy import EnergyMeter, visible_gpus
    from moe.energy.supervise import sources_for
    with EnergyMeter({ledger!r}, sources=sources_for(None, None), interval_s=0.2):
        print("up", flush=True)
        time.sleep({seconds})
"""


def program(ledger: Path, seconds: float = 1.0) -> str:
    """A program that meters the GPUs it sees."""
    return PROGRAM.format(ledger=str(ledger), seconds=seconds)


def gaps_of(ledger: Path) -> list[tuple[str, str]]:
    return [(record["reason"], record["detail"]) for record in read_ledger(ledger) if record["kind"] == "gap"]


def test_double_counting_by_rank(node, gpu, tmp_path):
    """1. Four ranks each start a meter on one GPU: the outer ledger bills it once, theirs all say that it does."""
    rank = textwrap.dedent(program(tmp_path / "rank").replace(repr(str(tmp_path / "rank")), "sys.argv[1]"))
    ranks = [f"{sys.executable} rank.py {tmp_path}/rank{n} &" for n in range(4)]
    (tmp_path / "rank.py").write_text(rank)
    command = [*MOE, "run", "--out", "run", "--", "sh", "-c", " ".join([*ranks, "wait"])]
    subprocess.run(command, cwd=tmp_path, env=node.env, check=True, capture_output=True, timeout=60)
    outer = fold_ledgers([tmp_path / "run" / "ledger.jsonl"])
    values = [r["energy_mj"] for r in read_ledger(tmp_path / "run" / "ledger.jsonl") if r["kind"] == "reading"]
    assert [device.uuid for device in outer.devices] == [gpu.uuid]
    assert outer.total.energy_mj == values[-1] - values[0]
    for n in range(4):
        (inner,) = fold_ledgers([tmp_path / f"rank{n}"]).segments
        assert inner.metered_by == str(tmp_path / "run" / "ledger.jsonl")
        assert inner.energy_j > 0
    ledgers = [tmp_path / "run" / "ledger.jsonl", *(tmp_path / f"rank{n}" for n in range(4))]
    together = fold_programme([RunLedgers(path.name, (path,)) for path in ledgers])
    assert together.measured.energy_mj == outer.total.energy_mj


def test_only_one_node_seen(tmp_path):
    """2. Every node writes a ledger of its own beside the first; the run directory is all of them."""
    run = RunDir(tmp_path)
    for number, watts in enumerate((100, 300)):
        with EnergyMeter(run.ledger(number), declared_power_w=watts, interval_s=0.1):
            time.sleep(0.3)
    parts = [fold_ledgers([run.ledger(number)]).total for number in range(2)]
    whole = fold_ledgers(run.ledgers()).total
    assert whole.energy_mj == sum(part.energy_mj for part in parts) > 0
    assert whole.device_hours == pytest.approx(sum(part.device_hours for part in parts))


def test_wrong_gpus(node, gpu, tmp_path):
    """3. Eight GPUs, the scheduler gave one: it alone is read and billed, by UUID."""
    for n in range(7):
        node.set(gpu, uuid=f"GPU-{n}", bus=n + 2)
    before = node.calls()["energy"]
    node.run(program(tmp_path / "ledger"), CUDA_VISIBLE_DEVICES="3")
    assert [device.uuid for device in fold_ledgers([tmp_path / "ledger"]).devices] == ["GPU-2"]
    assert node.calls()["energy"] - before < 20  # a probe and a reading each 0.2 s, of one GPU


@pytest.mark.parametrize("slices", ["MIG-1", f"MIG-{A}/7/0"])
def test_mig_crashes(node, gpu, tmp_path, slices):
    """4. Both forms of MIG id meter the GPU they are part of, and it alone."""
    node.set(gpu, uuid=A)
    node.set(gpu, uuid=B, bus=2)
    node.add_mig("MIG-1", A)
    node.run(program(tmp_path / "ledger", 0.5), CUDA_VISIBLE_DEVICES=slices)
    assert [device.uuid for device in fold_ledgers([tmp_path / "ledger"]).devices] == [A]


def test_mig_over_reports(node, gpu, tmp_path):
    """5. Two slices of one GPU are its energy once, with a note that others may share it."""
    del node.gpus[gpu.uuid]
    node.set(gpu, uuid=A, sliced=1)
    node.add_mig("MIG-1", A)
    node.add_mig("MIG-2", A)
    node.run(program(tmp_path / "ledger", 0.5), CUDA_VISIBLE_DEVICES="MIG-1,MIG-2")
    fold = fold_ledgers([tmp_path / "ledger"])
    (device,) = fold.devices
    values = [record["energy_mj"] for record in read_ledger(tmp_path / "ledger") if record["kind"] == "reading"]
    assert fold.total.energy_mj == values[-1] - values[0] > 0
    assert (device.uuid, device.note) == (A, "whole GPU, shared: no energy is told per MIG slice")


@pytest.mark.parametrize("mode", ["unsupported", "stuck", "blind"])
def test_silent_zero(node, gpu, tmp_path, mode):
    """6. No counter: power is integrated. A counter that stands still: a gap. Neither sensor: an estimate, named so."""
    node.set(gpu, mode=mode)
    node.run(program(tmp_path / "ledger", 2.6 if mode == "stuck" else 0.6))
    fold = fold_ledgers([tmp_path / "ledger"])
    if mode == "stuck":
        stuck = "the energy counter is stuck at 5000000 mJ while the GPU draws 500 W"
        assert gaps_of(tmp_path / "ledger") == [("lost", stuck)]
        assert f"{gpu.uuid}: reads failed once: {stuck}" in fold.notes
        assert fold.total.coverage < 1
    else:
        assert fold.total.energy_j > 200
        assert (fold.total.source, fold.total.measured) == {
            "unsupported": ("integrated", True),
            "blind": ("estimate:tdp", False),
        }[mode]


def test_counter_wrap_and_reset(node, gpu, tmp_path):
    """7. RAPL wraps through its range; a GPU's counter restarts with the driver: nothing negative, nothing hidden."""
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, value in {
        "name": "package-0",
        "energy_uj": 65_532_000_000,
        "max_energy_range_uj": 65_532_610_987,
    }.items():
        (zone / name).write_text(f"{value}\n")
    rapl = RaplSource(tmp_path / "powercap")
    (zone / "energy_uj").write_text("389013\n")
    assert list(rapl.read().values()) == [1000]
    path = tmp_path / "ledger"
    with node.start(program(path, 2.0)) as process:
        process.stdout.readline()
        time.sleep(0.7)
        node.set(gpu, base_mj=0, origin_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    assert gaps_of(path) == [("reset", "the counter fell: driver reloaded")]
    values = [record["energy_mj"] for record in read_ledger(path) if record["kind"] == "reading"]
    fold = fold_ledgers([path])
    assert fold.total.energy_mj == sum(max(0, after - before) for before, after in pairwise(values)) > 0
    assert any("what it used across that is not known" in note for note in fold.notes)


def test_rapl_permission(tmp_path):
    """8. A counter that cannot be read is an estimate with the reason, and never counts as measured."""
    sys_root = tmp_path / "sys"
    zone = sys_root / "class" / "powercap" / "intel-rapl:0"
    (zone / "energy_uj").mkdir(parents=True)  # not a number, whoever asks
    (zone / "name").write_text("package-0\n")
    with EnergyMeter(tmp_path / "ledger", sources=select_sources(sys_root=sys_root), interval_s=0.1):
        time.sleep(0.2)
    fold = fold_ledgers([tmp_path / "ledger"])
    assert (fold.total.source, fold.total.measured) == ("estimate:tdp", False)
    assert "energy is time x declared power" in fold.notes
    assert "intel-rapl:0/energy_uj cannot be read" in fold.devices[0].note


def test_network_and_location(node, gpu, tmp_path):
    """9. A run and its report open no connection and look up no name; no place means no carbon, not another place's."""
    node.run(program(tmp_path / "ledger.jsonl", 0.3))
    out = node.run(
        f"""
        import sys
        def forbid(event, args):
            assert not event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby")), event
        sys.addaudithook(forbid)
        from moe.energy.supervise import run_metered, sources_for
        from pathlib import Path
        run_metered(["true"], Path({str(tmp_path / "ledger.jsonl")!r}), sources_for(None, None))
        sys.argv[1:] = ["energy", "report", {str(tmp_path)!r}, "--json"]
        from moe.cli import main
        main()
        """
    )
    footprint = json.loads(out)["footprint"]
    assert footprint["numbers"]["energy_it"]["value"] > 0
    assert footprint["numbers"]["carbon_location"]["value"] is None


def test_monitor_keeps_a_dead_job_alive(node, gpu, tmp_path):
    """10. A training that raises is over at once, though its meter was never stopped."""
    process = node.start(f"""
        import time
        from moe.energy import EnergyMeter
        from moe.energy.supervise import sources_for
        EnergyMeter({str(tmp_path / "ledger")!r}, sources=sources_for(None, None)).start()
        print(time.monotonic(), flush=True)
        1 / 0
    """)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "ZeroDivisionError" in err
    assert time.monotonic() - float(out) < 5
    assert fold_ledgers([tmp_path / "ledger"]).segments[0].end_reason == "stopped"


def test_monitor_kills_a_live_job(node, gpu, tmp_path):
    """11. The GPU falls off the bus in mid-run: the program ends by itself, with its own exit code."""
    code = textwrap.dedent(program(tmp_path / "ledger", 1.0)) + "\nsys.exit(7)"
    with node.start(code) as process:
        process.stdout.readline()
        node.set(gpu, mode="lost")
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (7, "")
    assert gaps_of(tmp_path / "ledger") == [("lost", "GPU is lost")]


def test_lost_data_on_interruption(node, gpu, tmp_path, wait_until):
    """12. Killed without warning, started again in the same folder: both parts are there, and what lay between."""
    path = tmp_path / "ledger"
    with node.start(program(path, 60)) as process:
        process.stdout.readline()
        wait_until(lambda: fold_ledgers([path]).total.energy_j > 200)
        process.send_signal(signal.SIGKILL)
    before = fold_ledgers([path])
    node.run(program(path, 0.5))
    fold = fold_ledgers([path])
    assert [segment.ended for segment in fold.segments] == ["lost", "end"]
    values = [record["energy_mj"] for record in read_ledger(path) if record["kind"] == "reading"]
    assert fold.total.energy_mj == values[-1] - values[0] > before.total.energy_mj
    assert fold.total.unattributed_j > 0


def test_which_number_is_right(node, gpu, tmp_path):
    """13. A power sensor 8 % above the counter is reported at the end of the run, and none is preferred in silence."""
    node.set(gpu, gain=1080, tick_ns=20_000_000)
    node.run("import moe.energy.reader as r; r.CONDITIONS_S = 0.2\n" + textwrap.dedent(program(tmp_path / "l", 3.0)))
    (note,) = fold_ledgers([tmp_path / "l"]).notes
    assert note.startswith(f"{gpu.uuid}: its power sensor tells +")
    assert note.endswith("one of them is wrong")


def test_measuring_changes_the_thing(node, gpu, tmp_path):
    """14. One counter read a second and GPU, power at both ends, and never a process list."""
    node.set(gpu, uuid=B, bus=2)
    before = node.calls()
    code = textwrap.dedent(program(tmp_path / "ledger", 2.5)).replace("interval_s=0.2", "interval_s=1.0")
    node.run(code)
    calls = {name: count - before[name] for name, count in node.calls().items()}
    assert calls["energy"] <= 2 * (2.5 + 1 + 3)  # one a second, plus: probe, start, stop
    assert calls["power"] <= 2 * 3
    assert calls["processes"] == 0


def test_amd_counters_stuck(amd, tmp_path):
    """15. A counter that does not move while the GPU draws 300 W is not believed: power is integrated instead."""
    amd.run(program(tmp_path / "ledger", 1.0), AMDSMI_STUCK="1")
    fold = fold_ledgers([tmp_path / "ledger"])
    assert {device.note for device in fold.devices} == {"the energy counter stands still; power integrated"}
    assert fold.total.energy_j == pytest.approx(2 * 300, rel=0.5)
    assert fold.total.source == "integrated"
