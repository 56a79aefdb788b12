"""GPUs through unmodified nvidia-ml-py over the fake library: which ones, what they say, and what breaks."""

import json

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
