"""How near the meter comes to the truth, in real time, over the fake library's ticks, gains and power sensors.

A small share of what `scripts/bench meter-accuracy` does; docs/results/meter-accuracy.md has the large one.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .fake_node import FakeGpu, PowerScript

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"
LENGTHS = {0.5: 3, 1: 3, 2: 3, 5: 2, 10: 3, 12: 2}
SEED = 11


@pytest.fixture(scope="module")
def meter() -> ModuleType:
    """The benchmark's outcomes module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("meter_outcomes")


@pytest.fixture(scope="module")
def outcomes(meter):
    """Outcomes of one run of the meter on 80 GPUs, by group."""
    scenarios = sys.modules["meter_scenarios"]

    def make(epoch_ns):
        exact = scenarios.gpus("counter", 24, SEED, epoch_ns, exact=True)
        return exact + [gpu for chip in ("counter", "average", "instant") for gpu in drawn(chip, epoch_ns)]

    def drawn(chip, epoch_ns):
        return scenarios.gpus(chip, 32 if chip == "counter" else 12, SEED, epoch_ns)

    told = meter.measure("ours", sys.executable, make, scenarios.spans(LENGTHS, 14, SEED))
    groups = ("counter-exact", "counter-gain", "average-gain", "instant-gain")
    return {group: [one for one in told if one.uuid.startswith(f"GPU-{group}")] for group in groups}


def test_the_fake_gpu_and_its_library_compute_one_truth(node):
    """A counter of 1 ns ticks, read over and over, lies between Python's energies just before and after each read."""
    knots = ((0, 90_001), (7_000_000, 650_003), (7_000_000, 120_000), (19_000_001, 699_999), (23_000_000, 300_000))
    gpu = node.set(FakeGpu(tick_ns=1, script=PowerScript(knots=knots)))
    out = node.run(
        f"""
        import json, time
        from moe.energy.sources.nvml_library import nvml
        lib, now = nvml(), lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        handle = lib.nvmlDeviceGetHandleByUUID({gpu.uuid!r})
        reads = [(now(), lib.nvmlDeviceGetTotalEnergyConsumption(handle), now()) for _ in range(3000)]
        print(json.dumps(reads))
        """
    )
    reads = json.loads(out)
    open_mj = sorted(gpu.energy_mj(after) - gpu.energy_mj(before) for before, _, after in reads)
    assert open_mj[len(reads) // 2] < 20  # a read takes some microseconds
    for before, told_mj, after in reads:
        assert int(gpu.energy_mj(before)) <= told_mj <= gpu.energy_mj(after)


def test_the_scripts_formula_is_the_integral_of_its_power():
    """Against many small steps of the linear power, over two periods and a part."""
    script = PowerScript(knots=((0, 100), (4000, 500), (4000, 300), (10_000, 0)))

    def power_mw(at_ns):
        at_ns %= 10_000
        return 100 + 0.1 * at_ns if at_ns < 4000 else 300 - 0.05 * (at_ns - 4000)

    for until_ns in (0, 1, 3999, 4000, 9999, 10_000, 27_777):
        summed = sum(power_mw(at_ns + 0.5) for at_ns in range(until_ns))
        assert script.energy_mw_ns(until_ns) == pytest.approx(summed, abs=1e-6 * summed + 4)


def test_the_band_covers_the_truth_in_99_of_100_windows_of_a_counter(meter, outcomes):
    """Gains anywhere within 5 %; 0.5 to 12 s, steps, ramps and bursts: and the band is no wider than promised."""
    told = outcomes["counter-gain"]
    assert len(told) == 32 * sum(LENGTHS.values())
    assert meter.share_covered(told) >= 0.99
    assert meter.quantile(meter.widths(told), 0.99) <= 1.0


def test_a_counter_with_gain_1_errs_by_half_a_percent_at_most_from_ten_seconds_on(meter, outcomes):
    """Without the search for the tick it would be ten times that."""
    long = [one for one in outcomes["counter-exact"] if one.length_s >= 10]
    assert len(long) == 24 * 5
    assert meter.errors(long)[-1] <= 0.005
    assert meter.share_covered(outcomes["counter-exact"]) >= 0.99


@pytest.mark.parametrize("chip", ["average", "instant"])
def test_integrated_power_is_covered_by_a_band_that_knows_what_it_misses(meter, outcomes, chip):
    """A mean over a second tells late, 25 of 100 ms miss most of a burst: wide bands, which hold."""
    told = outcomes[f"{chip}-gain"]
    assert meter.share_covered(told) >= 0.99
    worst = meter.quantile(meter.errors(one for one in told if one.length_s >= 10), 0.9)
    assert worst < 0.2  # it measures, all the same
