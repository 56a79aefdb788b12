"""`moe energy doctor` on machines whose answer is known: eight GPUs, a host with RAPL, a bare host, and broken ones."""

import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HOST = os.uname().nodename
NODE_MEND = (
    "- whole node: it has no counter that can be read from here; "
    "`moe energy node RUN FILE` joins readings of a PDU, IPMI, Redfish or SLURM later"
)
NO_GPU = (
    "- GPUs: NVML cannot be used (NVML Shared Library Not Found); "
    "where there are some: let the container see the driver's utilities, or declare the power"
)


@pytest.fixture
def sys_root(tmp_path: Path) -> Path:
    root = tmp_path / "sys"
    (root / "class" / "powercap").mkdir(parents=True)
    return root


def rapl(sys_root: Path, mode: int = 0o444) -> None:
    """One readable or root-only package with memory."""
    for folder, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram")):
        zone = sys_root / "class" / "powercap" / folder
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text("1000000\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        (zone / "energy_uj").chmod(mode)


@contextmanager
def working(counter: Path) -> Iterator[None]:
    """A processor that draws power while something looks: its counter goes up 100 times a second."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.01):
            aside = counter.with_suffix(".new")
            aside.write_text(f"{int(counter.read_text()) + 1_000_000}\n")
            aside.replace(counter)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def doctor(node, sys_root):
    """Run the command on the node, behind a line `user` of Python; returns what it printed."""

    def call(*words: str, user: str = "", **env: str) -> str:
        code = f"{user}\nimport sys; sys.argv[1:] = {['energy', 'doctor', '--sys', str(sys_root), *words]!r}\n"
        code += "from moe.cli import main\nmain()"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**node.env, **env}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def masked(page: str) -> str:
    page = page.replace(HOST, "HOST").replace(f"CPU-{HOST}", "CPU-HOST")
    page = re.sub(r"(?m)^(GPU-.*) \d+ ms( declared)?", r"\1 TICK", page)
    page = re.sub(r"\d+ us", "CALL", page)
    return "\n".join(re.sub(" {2,}", "  ", line) for line in page.splitlines())


def test_a_node_of_eight_gpus(node, gpu, doctor):
    """A row each with the tick as seen; the host beside them, not in them; what is missing and how to get it."""
    del node.gpus[gpu.uuid]
    for i in range(8):
        node.set(gpu, uuid=f"GPU-{i}", bus=i + 1)
    node.set_machine(persistence=0)
    rows = [f"GPU-{i}  FakeH200  counter  gpu  5%  TICK  CALL" for i in range(8)]
    assert masked(doctor()).splitlines() == [
        "HOST: a run here is metered by counter, scope gpu",
        "",
        "device  name  source  scope  band  tick  read",
        *rows,
        "CPU-HOST  host at 100 W  estimate:tdp  node  37%  -  -",
        "",
        "CPU-HOST: no sensor: POWERCAP has no RAPL package domain: declare the power instead".replace(
            "POWERCAP", str(doctor_root(node))
        ),
        "",
        "not measured",
        "- energy between two runs: persistence mode is off on 8 GPUs: counters restart when nobody uses the driver; "
        "`nvidia-smi -pm 1` as root",
        NODE_MEND,
        f"- processors: {doctor_root(node)} has no RAPL package domain; `--power W` declares a power",
    ]


def test_the_tick_is_the_one_that_was_seen(node, gpu, doctor):
    """A counter that moves every 20 ms, not every 100 as declared; once in three, where other programs hold it up."""
    node.set(gpu, tick_ns=20_000_000)

    def seen() -> bool:
        sensor, _ = json.loads(doctor("--json"))["sensors"]
        return sensor["tick_seen"] and sensor["tick_s"] == pytest.approx(0.02, rel=0.2) and sensor["call_us"] > 0

    assert any(seen() for _ in range(3))


def doctor_root(node) -> Path:
    return Path(node.env["TMPDIR"]).parent / "sys" / "class" / "powercap"


def test_a_host_with_rapl_alone(node, doctor, sys_root):
    """Metered by its processors; no GPU is nothing to mend. Its tick is the declared one."""
    rapl(sys_root)
    node.env["LD_LIBRARY_PATH"] = "/nonexistent"
    with working(sys_root / "class" / "powercap" / "intel-rapl:0" / "energy_uj"):
        page = doctor()
    assert masked(page).splitlines() == [
        "HOST: a run here is metered by rapl, scope node",
        "",
        "device  name  source  scope  band  tick  read",
        "CPU-HOST  package-0 + package-0/dram  rapl  node  5%  1 ms declared  CALL",
        "",
        "CPU-HOST: processor packages and, where counted, memory; not the rest of the node",
        "",
        "not measured",
        NO_GPU,
        NODE_MEND,
    ]


def test_a_host_counter_that_stands_still_is_not_called_measured(node, doctor, sys_root):
    """Some machines show RAPL and never count: said in words."""
    rapl(sys_root)
    node.env["LD_LIBRARY_PATH"] = "/nonexistent"
    page = doctor()
    assert page.startswith(f"{HOST}: a run here is not measured: rapl, scope node\n")
    assert f"CPU-{HOST}: the counter stands still: no change in 0.25 s\n" in page


def test_a_bare_host(node, doctor):
    """Nothing can be measured: said in the first line, and still exit code 0."""
    node.env["LD_LIBRARY_PATH"] = "/nonexistent"
    page = masked(doctor()).splitlines()
    assert page[0] == "HOST: a run here is not measured: estimate:tdp, scope node"
    assert page[3] == "CPU-HOST  host at 100 W  estimate:tdp  node  37%  -  -"
    assert page[-3:] == [
        NO_GPU,
        NODE_MEND,
        f"- processors: {doctor_root(node)} has no RAPL package domain; `--power W` declares a power",
    ]
    found = json.loads(doctor("--json"))
    assert list(found) == ["host", "measured", "sensors", "missing"]
    assert found["measured"] is False


def test_root_only_rapl_names_the_reason_and_the_command(node, sys_root):
    """As nobody: the CVE, and chmod on the tree that was looked at."""
    if os.getuid() != 0:
        pytest.skip(
            "runs where the tests are root's, as in a container: they become a user who may not read the counter"
        )
    rapl(sys_root, mode=0o400)
    node.env["LD_LIBRARY_PATH"] = "/nonexistent"
    for folder in [sys_root, *sys_root.parents]:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o055)
    code = f"""
        import os, pynvml, moe.energy.doctor  # nobody may not be able to read this Python either
        from pathlib import Path
        from moe.cli.doctor import doctor
        os.setgid(65534); os.setuid(65534)
        doctor(False, Path({str(sys_root)!r}))
    """
    page = node.run(code)
    assert (
        "- processors: RAPL counters may only be read by root since CVE-2020-8694; "
        f"`chmod a+r {sys_root}/class/powercap/*/energy_uj` as root, if users here may see each other's power\n"
    ) in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"mode": "stuck"}, "the counter stands still while the GPU draws 500 W", id="stuck"),
        pytest.param({"mode": "lost"}, ": GPU is lost", id="lost"),
        pytest.param({"mode": "noperm"}, ": Insufficient Permissions", id="no permission"),
        pytest.param(
            {"mode": "unsupported"},
            "power averaged over 1 s, integrated: one read a second sees all of the time",
            id="power",
        ),
        pytest.param({"mode": "blind"}, "no sensor: the driver tells neither energy nor power", id="blind"),
        pytest.param({"sliced": 1}, "whole GPU, shared: no energy is told per MIG slice", id="MIG"),
    ],
)
def test_what_is_wrong_with_a_gpu_stands_below_the_table(node, gpu, doctor, change, words):
    """Each with the GPU's name; what cannot be read now is not called measured."""
    node.set(gpu, **change)
    page = doctor()
    assert f"{gpu.uuid}: " in page
    assert words in page
    assert ("is not measured" in page) == (change.get("mode") in ("stuck", "lost", "noperm", "blind"))


def test_a_broken_driver_is_told_from_none(node, gpu, doctor):
    """The host is no way out: a run that sees GPUs it cannot read stops with the same sentence."""
    node.set_machine(init_code=18)
    page = doctor()
    assert f"{HOST}: a run here cannot be metered before its GPUs can be read\n" in page
    assert "; the driver was updated under the running system, reboot the node, or declare the power\n" in page
    assert json.loads(doctor("--json"))["measured"] is False


def test_a_missing_nvidia_ml_py_is_named_with_its_pip_line(node, doctor):
    page = doctor(user="import sys; sys.modules['pynvml'] = None")
    assert "- GPUs: nvidia-ml-py is not installed; where there are some: `pip install nvidia-ml-py`" in page


def test_hidden_gpus_are_told_from_none(node, gpu, doctor):
    page = doctor(CUDA_VISIBLE_DEVICES="")
    assert "- GPUs: CUDA_VISIBLE_DEVICES and cgroups leave none of the GPUs there are" in page


def test_another_meter_on_a_gpu_is_named_with_its_process(node, gpu, doctor):
    """By the lock, which doctor does not take."""
    code = f"""
        import sys
        from moe.energy import EnergyMeter
        with EnergyMeter(None, [{gpu.uuid!r}]):
            print("up", flush=True)
            sys.stdin.read()
    """
    with node.start(code, stdin=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == "up\n"
        assert f"{gpu.uuid}: another meter reads it, process {reader.pid}\n" in doctor()
        reader.communicate("")
    assert "another meter" not in doctor()


def test_it_starts_in_half_a_second_and_imports_no_torch(doctor):
    """Processor time, the best of five, the quarter of a second of watching not counted because it sleeps."""

    def spent_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        doctor()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(spent_s() < 0.5 for _ in range(5))
    heavy = (
        "import atexit, sys; atexit.register(lambda: print({'torch', 'numpy', 'rich', 'amdsmi'} & set(sys.modules)))"
    )
    assert doctor("--json", user=heavy).endswith("set()\n")
