"""GPUs through unmodified nvidia-ml-py over the fake library: which ones, what they say, and what breaks."""

import json
import subprocess

import pytest

TWO = """
    import json
    from moe.energy import visible_gpus
    print(json.dumps([[g.uuid, g.shared] for g in visible_gpus()]))
"""
A = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
B = "GPU-bbbbbbbb-0000-0000-0000-000000000000"
C = "GPU-bbcccccc-0000-0000-0000-000000000000"


@pytest.fixture
def three(node, gpu):
    """Three GPUs of one model whose NVML order (A, B, C) is not their PCI order (C, A, B)."""
    node.set(gpu, uuid=A, bus=2)
    node.set(gpu, uuid=B, bus=3)
    node.set(gpu, uuid=C, bus=1)
    node.add_mig("MIG-11111111-0000-0000-0000-000000000000", B)
    return node


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        pytest.param(None, [C, A, B], id="unset is all"),
        pytest.param("0", [C], id="integers count in PCI order"),
        pytest.param("2,0", [B, C], id="the order is the user's"),
        pytest.param("1,7,0", [A], id="an invalid integer hides the later ones"),
        pytest.param("-1", [], id="minus one hides all"),
        pytest.param("", [], id="empty hides all"),
        pytest.param(A, [A], id="a UUID"),
        pytest.param("GPU-aa,GPU-bbc", [A, C], id="beginnings of UUIDs"),
        pytest.param("GPU-bb", [], id="an ambiguous beginning is no GPU"),
        pytest.param("0,0", [C], id="a GPU is billed once"),
    ],
)
def test_visible_gpus_reads_cuda_visible_devices_as_cuda_does(three, visible, expected):
    """Integers, UUIDs and abbreviations resolve to the UUIDs CUDA would use."""
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert json.loads(three.run(TWO, **env)) == [[uuid, False] for uuid in expected]


@pytest.mark.parametrize("mig", ["MIG-11111111-0000-0000-0000-000000000000", f"MIG-{B}/3/0"])
def test_a_mig_slice_resolves_to_its_gpu_and_says_the_whole_is_billed(three, mig):
    """Both forms of MIG id lead to the parent, flagged as shared, and the device's note says so."""
    assert json.loads(three.run(TWO, CUDA_VISIBLE_DEVICES=mig)) == [[B, True]]
    note = three.run(
        f"from moe.energy import select_sources; print(select_sources([{mig!r}])[0].devices[0].note)",
    )
    assert note == "whole GPU, shared: no energy is told per MIG slice\n"


def test_integers_over_unlike_gpus_need_an_order(node, gpu):
    """With two models CUDA sorts by speed, which NVML does not know: the user must say PCI_BUS_ID."""
    node.set(gpu, uuid=A, bus=2)
    node.set(gpu, uuid=B, bus=1, name="FakeA100")
    process = node.start(TWO, CUDA_VISIBLE_DEVICES="0")
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs" in process.communicate()[1]
    assert process.returncode == 1
    assert json.loads(node.run(TWO, CUDA_VISIBLE_DEVICES="0", CUDA_DEVICE_ORDER="PCI_BUS_ID")) == [[B, False]]


def test_gpus_a_cgroup_blocks_are_not_visible(node, gpu):
    """NVML counts them all; only those that open are ours."""
    node.set(gpu, uuid=A, bus=1, mode="blocked")
    node.set(gpu, uuid=B, bus=2)
    assert json.loads(node.run(TWO, CUDA_VISIBLE_DEVICES="0")) == [[B, False]]


def test_a_machine_without_driver_has_no_gpus(node):
    """No library: an empty list, not an error; a GPU asked for by name is an error."""
    node.env["LD_LIBRARY_PATH"] = "/nonexistent"
    assert json.loads(node.run(TWO)) == []
    process = node.start(f"from moe.energy import select_sources; select_sources([{A!r}])")
    assert "NoNvmlError: NVML cannot be used (NVML Shared Library Not Found)" in process.communicate()[1]
    assert process.returncode == 1


def test_the_counter_is_read_in_integer_millijoules(node, gpu):
    """Two reads lie on the fake's counter: multiples of one tick (50 J) above its base."""
    out = node.run(
        f"""
        import time
        from moe.energy import select_sources
        source, = select_sources([{gpu.uuid!r}])
        device, = source.devices
        first = source.read()[device.uuid]; time.sleep(0.5); second = source.read()[device.uuid]
        print(device.source, device.scope, device.band, device.p_max_w, first, second)
        """
    ).split()
    assert out[:4] == ["counter", "gpu", "0.05", "700.0"]
    first, second = int(out[4]), int(out[5])
    assert first >= gpu.base_mj
    assert (first - gpu.base_mj) % 50_000 == 0
    assert second - first >= 200_000
    assert (second - first) % 50_000 == 0


def test_without_a_counter_power_is_integrated_and_says_so(node, gpu):
    """NOT_SUPPORTED: 500 W over 2 s of reads give 1000 J, under the source `integrated` and a wider band."""
    node.set(gpu, mode="unsupported")
    out = node.run(
        f"""
        import time
        from moe.energy import select_sources
        source, = select_sources([{gpu.uuid!r}])
        device, = source.devices
        source.read(); start = time.monotonic()
        for _ in range(20):
            time.sleep(0.1); energy = source.read()[device.uuid]
        print(device.source, device.band, energy / 1000 / (time.monotonic() - start))
        """
    ).split()
    assert out[:2] == ["integrated", "0.1"]
    assert float(out[2]) == pytest.approx(500, rel=0.01)


OPEN = """
    from moe.energy import select_sources
    for source in select_sources([{uuid!r}]):
        for device in source.devices:
            print(device.source, device.scope, device.band, device.note, sep="|")
"""


@pytest.mark.parametrize(
    ("chip", "expected"),
    [
        pytest.param(
            {"arch": 9}, "0.1|power averaged over 1 s, integrated: one read a second sees all of the time", id="Hopper"
        ),
        pytest.param(
            {"arch": 7}, "0.1|power averaged over 1 s, integrated: one read a second sees all of the time", id="Ampere"
        ),
        pytest.param(
            {"arch": 7, "average": 0},
            "0.2|instantaneous power, integrated: one read a second sees 2.5% of the time",
            id="GA100 has no average",
        ),
        pytest.param(
            {"arch": 6, "average": 0},
            "0.2|instantaneous power, integrated: one read a second sees 10.0% of the time",
            id="Turing",
        ),
        pytest.param(
            {"arch": 5, "average": 0},
            "0.2|instantaneous power, integrated: one read a second sees 1.0% of the time",
            id="Volta",
        ),
    ],
)
def test_the_power_field_is_chosen_by_architecture_and_the_device_says_what_it_sees(node, gpu, chip, expected):
    """Average where there is one, else the instant; the note tells what share of time a read covers."""
    node.set(gpu, mode="unsupported", **chip)
    assert node.run(OPEN.format(uuid=gpu.uuid)) == f"integrated|gpu|{expected}\n"


def test_averaged_power_sees_a_burst_that_instants_miss(node, gpu):
    """100 and 900 W in turns of 50 ms, read every 0.2 s in step with them: only the average tells the mean."""
    bursty = {"mode": "unsupported", "power1_mw": 100_000, "power2_mw": 900_000, "period_ns": 100_000_000}
    code = f"""
        import time
        from moe.energy import select_sources
        source, = select_sources([{gpu.uuid!r}])
        for _ in range(6):
            at = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - {{origin}}
            time.sleep((200_000_000 - at % 200_000_000 + 10_000_000) / 1e9)
            energy = source.read()[{gpu.uuid!r}]
            start = start if energy else time.monotonic()
        print(energy / 1000 / (time.monotonic() - start))
    """
    watts = {}
    for average in (1, 0):
        state = node.set(gpu, **bursty, average=average)
        watts[average] = float(node.run(code.format(origin=state.origin_ns)))
    assert watts[1] == pytest.approx(500, rel=0.05)
    assert watts[0] < 300


def test_a_driver_without_the_counters_symbol_is_integrated(node, gpu, old_nvml_library):
    """FUNCTION_NOT_FOUND for the counter and for fields: the old power call is left, an average on a Hopper."""
    old = {"LD_LIBRARY_PATH": str(old_nvml_library)}
    look = "        print(sorted(source.conditions()[device.uuid]))\n"
    out = node.run(OPEN.format(uuid=gpu.uuid) + look, **old)
    assert out == (
        "integrated|gpu|0.1|power averaged over 1 s, integrated: one read a second sees all of the time\n"
        "['power_limit_w', 'power_w', 'sm_clock_mhz', 'temperature_c', 'throttle']\n"
    )


def test_a_gpu_that_tells_neither_energy_nor_power_is_estimated_beside_the_others(node, gpu):
    """A vGPU among GPUs: its energy is an estimate that says so, the others' stays measured."""
    node.set(gpu, uuid=A)
    node.set(gpu, uuid=B, mode="blind")
    out = node.run(
        f"""
        from moe.energy import select_sources
        for source in select_sources([{A!r}, {B!r}]):
            for device in source.devices:
                print(device.uuid, device.source, device.note)
        """
    )
    assert out == (f"{A} counter None\n{B} estimate:tdp no sensor: the driver tells neither energy nor power\n")


def test_a_counter_that_stands_still_under_power_is_a_failed_read(node, gpu):
    """Never a silent zero: after 2 s without a step, 500 W of power make the read None, with both numbers."""
    node.set(gpu, mode="stuck")
    out = node.run(
        f"""
        import time
        from moe.energy import select_sources
        source, = select_sources([{gpu.uuid!r}])
        print(source.read()[{gpu.uuid!r}]); time.sleep(2.1)
        print(source.read()[{gpu.uuid!r}], source.failures[{gpu.uuid!r}])
        """
    )
    assert out == "5000000\nNone the energy counter is stuck at 5000000 mJ while the GPU draws 500 W\n"


def test_a_counter_that_stands_still_without_power_is_believed(node, gpu):
    """No power, no energy: that zero is true."""
    node.set(gpu, mode="stuck", power1_mw=0, power2_mw=0)
    out = node.run(
        f"""
        import time
        from moe.energy import select_sources
        source, = select_sources([{gpu.uuid!r}])
        source.read(); time.sleep(2.1)
        print(source.read()[{gpu.uuid!r}], source.failures)
        """
    )
    assert out == "5000000 {}\n"


def test_a_power_read_that_fails_does_not_discard_the_counter(node, gpu):
    """Power is asked for only to doubt a counter that stands still: no answer, no doubt."""
    code = f"""
        import time
        from moe.energy import select_sources
        source, = select_sources([{gpu.uuid!r}])
        print("open", flush=True)
        input()
        before = source.read(); time.sleep(2.1)
        print(source.read() == before, source.failures)
    """
    with node.start(code, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "open\n"
        node.set(gpu, mode="mute")
        assert process.communicate("\n")[0] == "True {}\n"


def test_power_that_would_be_read_rarely_is_refused(node, gpu):
    """An integrated sensor at ten seconds a read measures next to nothing: one sentence names the setting."""
    node.set(gpu, mode="unsupported")
    out = node.run(f"""
        from moe.energy import EnergyMeter
        from moe.errors import ConfigError
        EnergyMeter(None, [{gpu.uuid!r}], interval_s=1.0).start().stop()
        try:
            EnergyMeter(None, [{gpu.uuid!r}], interval_s=10, flush_s=10).start()
        except ConfigError as error:
            print(error)
    """)
    assert out == (
        f"energy.interval_s=10 is too long for {gpu.uuid}, which tells power and no energy: give at most 1\n"
    )


def test_a_driver_updated_under_the_running_system_is_one_sentence(node, gpu):
    """LIB_RM_VERSION_MISMATCH is no machine without GPUs: the error says what to do."""
    node.set_machine(init_code=18)
    process = node.start(TWO)
    _, err = process.communicate()
    assert "SensorError: NVML cannot be used (" in err
    assert "the driver was updated under the running system, reboot the node, or declare the power\n" in err
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("uuid", "sentence"),
    [
        (A, "(Insufficient Permissions): this user or container may not use it, ask the scheduler for it"),
        (B, "(Not Found): name one that `nvidia-smi -L` lists"),
    ],
    ids=["a cgroup hides it", "another machine's"],
)
def test_a_gpu_that_cannot_be_opened_is_one_sentence(node, gpu, uuid, sentence):
    """Which GPU, the driver's reason, and what to do."""
    node.set(gpu, uuid=A, mode="blocked")
    process = node.start(OPEN.format(uuid=uuid))
    assert f"SensorError: GPU {uuid} cannot be opened {sentence}, or declare the power\n" in process.communicate()[1]


def test_slices_named_by_cudas_uuid_are_one_shared_gpu(three):
    """CUDA gives a slice's UUID without saying that it is one: both slices lead to the GPU, which is read once."""
    three.add_mig("MIG-22222222-0000-0000-0000-000000000000", B)
    out = three.run(
        """
        from moe.energy import select_sources
        names = [f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in "12"]
        for device in select_sources(names)[0].devices:
            print(device.uuid, device.note)
        """
    )
    assert out == f"{B} whole GPU, shared: no energy is told per MIG slice\n"


def test_a_grace_hopper_module_has_a_scope_of_its_own_and_no_host_is_added(node, gpu, tmp_path):
    """The counter covers processor and memory as well: scope `module`, one device, whatever sensors the host has."""
    node.set(gpu, name="NVIDIA_GH200_480GB")
    zone = tmp_path / "sys" / "class" / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("1\n")
    out = node.run(
        f"""
        from pathlib import Path
        from moe.energy import select_sources
        for source in select_sources([{gpu.uuid!r}], sys_root=Path({str(tmp_path / "sys")!r})):
            for device in source.devices:
                print(device.source, device.scope, device.note)
                print(round(source.conditions()[device.uuid]["power_w"]))
        """
    )
    assert out == (
        "counter module whole Grace Hopper module: processor and memory are inside, nothing is added for the host\n"
        "500\n"
    )


def test_a_gpu_cut_into_slices_is_noted_as_shared_however_it_was_named(node, gpu):
    """With MIG on, the parent's own UUID bills the whole GPU too."""
    node.set(gpu, sliced=1)
    assert node.run(OPEN.format(uuid=gpu.uuid)) == (
        "counter|gpu|0.05|whole GPU, shared: no energy is told per MIG slice\n"
    )


@pytest.mark.parametrize(("mode", "reason"), [("noperm", "Insufficient Permissions"), ("lost", "GPU is lost")])
def test_a_failing_counter_gives_none_and_the_drivers_reason(node, gpu, mode, reason):
    """A read that fails is None, never an exception and never zero; the source comes back when the GPU does."""
    code = f"""
        import time
        from moe.energy import select_sources
        source, = select_sources([{gpu.uuid!r}])
        print(source.read()[{gpu.uuid!r}] > 0, flush=True)
        for _ in range(2):
            time.sleep(0.4)
            print(source.read()[{gpu.uuid!r}], source.failures, flush=True)
    """
    with node.start(code) as process:
        assert process.stdout.readline() == "True\n"
        node.set(gpu, mode=mode)
        assert process.stdout.readline() == f"None {{'{gpu.uuid}': '{reason}'}}\n"
        node.set(gpu, mode="ok")
        assert int(process.stdout.readline().split()[0]) > gpu.base_mj
    assert process.returncode == 0
