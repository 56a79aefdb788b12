"""AMD GPUs through a stand-in `amdsmi` that returns what the real one documents."""

import pytest

from moe.energy import fold_ledgers

FIRST, SECOND = (f"AMD-{n}aff74a1-0000-1000-80e8-000000000000" for n in range(2))
READ = f"""
    import time
    from moe.energy import select_sources
    source, = select_sources([{FIRST!r}])
    device, = source.devices
    first, start = source.read()[device.uuid], time.monotonic()
    time.sleep(0.6)
    watts = (source.read()[device.uuid] - first) / 1000 / (time.monotonic() - start)
    print(device.name, device.source, device.scope, device.band, device.note, round(watts, -1), sep="|")
"""


@pytest.mark.parametrize("old", [False, True], ids=["energy_accumulator", "before 6.2.1"])
def test_the_counter_is_steps_times_their_size(amd, old):
    """Accumulator x 15.3 uJ, under both names the number has had."""
    out = amd.run(READ, **({"AMDSMI_OLD": "1"} if old else {}))
    assert out == "AMD Instinct MI300X|counter|gpu|0.05|None|300.0\n"


def test_a_counter_that_stands_still_is_not_believed(amd):
    """Two probes half a second apart see no step while the GPU draws 300 W: power is integrated, the note says it."""
    out = amd.run(READ, AMDSMI_STUCK="1")
    assert out == ("AMD Instinct MI300X|integrated|gpu|0.2|the energy counter stands still; power integrated|300.0\n")


def test_a_guest_without_counter_is_integrated_and_one_that_tells_nothing_is_estimated(amd):
    out = amd.run(READ, AMDSMI_GUEST="1")
    assert "|integrated|gpu|0.2|no energy counter; power integrated|300.0" in out
    out = amd.run(READ, AMDSMI_GUEST="1", AMDSMI_BLIND="1")
    assert "|estimate:tdp|gpu|0.37|no sensor: the driver tells neither energy nor power|700.0" in out


@pytest.mark.parametrize(
    ("env", "expected"),
    [({}, "0.1 1.0 750.0"), ({"AMDSMI_STUCK": "1"}, "1.0 0.0 750.0"), ({"AMDSMI_GUEST": "1"}, "1.0 0.0 None")],
    ids=["counter", "integrated", "integrated, a guest that is told no cap"],
)
def test_power_read_once_a_second_is_no_more_than_moments(amd, env, expected):
    """Tick, share of time seen, highest power: of integrated power the ends are open by a second's reads."""
    code = f"""
        from moe.energy import select_sources
        device = select_sources([{FIRST!r}])[0].devices[0]
        print(device.tick_s, device.seen, device.p_max_w)
    """
    assert amd.run(code, **env) == f"{expected}\n"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, [FIRST, SECOND]),
        ({"HIP_VISIBLE_DEVICES": "1"}, [SECOND]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, [SECOND]),
        ({"ROCR_VISIBLE_DEVICES": "5,0"}, []),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [SECOND]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [FIRST]),
    ],
)
def test_visible_gpus_are_amds_where_there_is_no_nvml(amd, env, expected):
    """HIP counts among the GPUs that ROCR left; an entry that names none hides the rest."""
    code = "from moe.energy import visible_gpus; print([gpu.uuid for gpu in visible_gpus()])"
    assert amd.run(code, **env) == f"{expected}\n"


def test_nothing_of_amd_is_imported_where_it_is_not_asked_for(node, gpu):
    code = f"""
        import sys
        from moe.energy import select_sources
        select_sources([{gpu.uuid!r}])
        print("amdsmi" in sys.modules)
    """
    assert node.run(code) == "False\n"


def test_an_amd_gpu_without_amdsmi_is_one_sentence(node):
    process = node.start(f"from moe.energy import select_sources; select_sources([{FIRST!r}])")
    assert "SensorError: amdsmi cannot be imported: install it from /opt/rocm/share/amd_smi" in process.communicate()[1]


def test_what_the_library_does_not_tell_is_one_sentence_or_left_out(amd):
    """No list of GPUs is a SensorError; a GPU without a uuid is not visible; one without a name has a plain one."""
    process = amd.start(f"from moe.energy import select_sources; select_sources([{FIRST!r}])", AMDSMI_UNLISTED="1")
    assert (
        process.communicate()[1]
        .splitlines()[-1]
        .endswith(
            "SensorError: amdsmi cannot list its GPUs (AMDSMI_STATUS_DRM_ERROR): check the driver, or declare the power"
        )
    )
    code = "from moe.energy import visible_gpus; print([gpu.uuid for gpu in visible_gpus()])"
    assert amd.run(code, AMDSMI_NO_UUID="0") == f"{[SECOND]}\n"
    code = f"from moe.energy import select_sources; print(select_sources([{FIRST!r}])[0].devices[0].name)"
    assert amd.run(code, AMDSMI_NAMELESS="1") == "AMD GPU\n"


@pytest.fixture
def placed(amd, tmp_path):
    """The node whose GPUs tell PCI addresses, as amdsmi writes them."""
    with (tmp_path / "amdsmi.py").open("a") as file:
        file.write("def amdsmi_get_gpu_device_bdf(handle):\n    return f'0000:0{handle}:0A.0'\n")
    return amd


def test_what_torch_calls_a_gpu_is_found_by_its_pci_address(placed):
    """HIP's own UUID is another than amdsmi's; one that amdsmi does not list keeps it, and cannot be opened."""
    code = """
        from types import SimpleNamespace
        from moe.energy.sources import uuid_of
        for bus in (1, 7):
            found = SimpleNamespace(uuid="x", pci_domain_id=0, pci_bus_id=bus, pci_device_id=10)
            print(uuid_of(found, hip=True), uuid_of(found, hip=False))
    """
    assert placed.run(code).splitlines() == [f"{SECOND} GPU-x", "AMD-x GPU-x"]


def test_a_training_on_amd_gpus_is_metered_by_their_counter(placed, tmp_path):
    """The trainer's meter of a rank on the second GPU, from torch's properties of it to the ledger."""
    code = f"""
        import time, torch
        from pathlib import Path
        from types import SimpleNamespace
        from moe.config import EnergyConfig
        from moe.rundir import RunDir
        from moe.trainer import metering
        from moe.trainer.start import Start
        torch.version.hip = "7.0"
        properties = SimpleNamespace(uuid="x", pci_domain_id=0, pci_bus_id=1, pci_device_id=10)
        torch.cuda.get_device_properties = lambda device: properties
        recipe, engine = SimpleNamespace(energy=EnergyConfig()), SimpleNamespace(device=torch.device("cuda", 0))
        run = RunDir.named("x", Path({str(tmp_path)!r}))
        run.create()
        meter = metering.TrainingMeter(recipe, run, engine, Start(trained=False))
        time.sleep(1)
        meter.stop()
    """
    placed.run(code)
    fold = fold_ledgers([tmp_path / "x/ledger.jsonl"])
    (device,) = fold.devices
    assert (device.uuid, device.name, device.source) == (SECOND, "AMD Instinct MI300X", "counter")
    assert fold.total.energy_j / fold.phases["idle"].elapsed_s == pytest.approx(300, rel=0.2)
