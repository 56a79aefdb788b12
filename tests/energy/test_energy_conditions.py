"""Temperature, clock, limits and throttling beside the joules; and the counter against the power sensor."""

import json

import pytest

from moe.energy import fold_ledgers, read_ledger
from moe.energy.conditions import PowerCheck, check_power, summarize

from .scribe import A, Scribe

METER = """
    import time
    import moe.energy.reader
    moe.energy.reader.CONDITIONS_S = {every_s}
    from moe.energy import EnergyMeter
    with EnergyMeter({ledger!r}, [{uuid!r}], interval_s=0.25):
        time.sleep({seconds})
"""


def test_conditions_stand_on_the_first_and_last_readings_and_fold_to_min_mean_max(node, gpu, tmp_path):
    """A 700 W GPU at its limit; a run shorter than a minute has two looks, and its other lines are as they were."""
    node.set(gpu, power1_mw=700_000, power2_mw=700_000)
    path = tmp_path / "ledger.jsonl"
    node.run(METER.format(every_s=60, ledger=str(path), uuid=gpu.uuid, seconds=1.2))
    first, *between, last = [record for record in read_ledger(path) if record["kind"] == "reading"]
    for record in (first, last):
        assert (record["temperature_c"], record["sm_clock_mhz"], record["power_limit_w"]) == (61, 1980, 700.0)
        assert record["throttle"] == ["sw_power_cap"]
        assert record["power_w"] == pytest.approx(700, rel=0.01)
    assert between
    assert not any("temperature_c" in record or "throttle" in record for record in between)
    report = fold_ledgers([path]).to_json()
    (device,) = json.loads(json.dumps(report))["devices"]
    assert device["conditions"]["temperature_c"] == {"min": 61, "mean": 61, "max": 61}
    assert device["conditions"]["sm_clock_mhz"]["mean"] == 1980
    assert device["conditions"]["throttle"] == {"sw_power_cap": 1.0}


def test_looks_are_summed_up_each_number_by_itself():
    """A number one look lacks does not shift the others; a reason's share is of the looks that were told reasons."""
    looks = [
        {"temperature_c": 50, "throttle": []},
        {"temperature_c": 60, "throttle": ["sw_power_cap", "sw_thermal"], "sm_clock_mhz": 1980},
        {"throttle": ["sw_power_cap"]},
        {"temperature_c": 70},
    ]
    assert summarize(looks) == {
        "temperature_c": {"min": 50, "mean": 60, "max": 70},
        "sm_clock_mhz": {"min": 1980, "mean": 1980, "max": 1980},
        "throttle": {"sw_power_cap": 2 / 3, "sw_thermal": 1 / 3},
    }
    assert summarize([]) == {}


def test_counter_and_power_sensor_that_differ_are_reported_at_the_end(node, gpu, tmp_path):
    """Sensors 6 % off either way are named with their ratio; one that agrees is not mentioned."""
    del node.gpus[gpu.uuid]
    gains = {f"GPU-{gain}": gain for gain in (940, 1000, 1060)}
    for bus, (uuid, gain) in enumerate(gains.items()):
        node.set(gpu, uuid=uuid, bus=bus, gain=gain, tick_ns=20_000_000)
    path = tmp_path / "ledger.jsonl"
    uuids = "', '".join(gains)
    node.run(METER.format(every_s=0.2, ledger=str(path), uuid="X", seconds=3.5).replace("'X'", f"'{uuids}'"))
    fold = fold_ledgers([path])
    low, high = (note for note in fold.notes if "its power sensor tells" in note)
    assert low.startswith("GPU-940: its power sensor tells -")
    assert high.startswith("GPU-1060: its power sensor tells +")
    assert high.endswith("seconds read by both: one of them is wrong")
    for device in fold.devices:
        ratio = device.conditions["power_over_counter"]["ratio"]
        assert ratio == pytest.approx(gains[device.uuid] / 1000, abs=0.02)


def test_a_few_percent_within_the_spread_of_the_pairs_is_no_alarm():
    """5 % apart, but pairs that scatter by 30 %, or only four of them: that proves nothing."""
    scattered = [(400.0, 500.0), (650.0, 500.0), (380.0, 500.0), (640.0, 500.0), (555.0, 500.0)]
    assert check_power(scattered) == PowerCheck(ratio=1.05, error=pytest.approx(0.115, abs=0.01), num_pairs=5)
    assert not check_power(scattered).disagrees
    steady = [(525.0 + i, 500.0 + i) for i in range(5)]
    assert check_power(steady).disagrees
    assert not check_power(steady[:4]).disagrees
    assert check_power([]) is None
    assert check_power([(500.0, 0.0), (500.0, 0.0)]) is None


def test_a_second_across_a_reset_is_no_pair(tmp_path):
    """The counter's power is only compared over seconds it counted through."""
    scribe = Scribe(tmp_path / "ledger.jsonl", 0)
    for second, energy_mj in enumerate([900_000, 1_400_000, 50_000, 550_000, 1_050_000]):
        scribe.add("reading", second, device=A, energy_mj=energy_mj, power_w=500.0)
    scribe.close()
    check = fold_ledgers([tmp_path / "ledger.jsonl"]).devices[0].conditions["power_over_counter"]
    assert (check["ratio"], check["num_pairs"]) == (1.0, 3)


def test_a_second_that_was_not_read_at_both_ends_is_no_pair(tmp_path):
    """Readings at 1, 2.5, 4 and 7 s: across three seconds the counter's power is a mean of more than the sensor's."""
    scribe = Scribe(tmp_path / "ledger.jsonl", 0)
    for at_s, energy_mj in ((0, 0), (1, 500_000), (2.5, 1_250_000), (4, 2_000_000), (7, 2_600_000)):
        scribe.add("reading", at_s, device=A, energy_mj=energy_mj, power_w=500.0)
    scribe.close()
    check = fold_ledgers([tmp_path / "ledger.jsonl"]).devices[0].conditions["power_over_counter"]
    assert (check["ratio"], check["num_pairs"]) == (1.0, 3)


def test_a_lost_sensor_and_a_reset_are_sentences_of_the_report(tmp_path):
    """What stopped the counting stands in the notes, each kind once with how often and what it said last."""
    scribe = Scribe(tmp_path / "ledger.jsonl", 0)
    scribe.read(1, 900)
    for second, detail in ((2, "no power read for 6.1 s"), (4, "GPU is lost")):
        scribe.add("gap", second, device=A, reason="lost", detail=detail)
        scribe.read(second + 1, 1000 * second)
    scribe.add("gap", 6, device=A, reason="reset", detail="the counter fell: driver reloaded")
    scribe.end(7)
    notes = fold_ledgers([tmp_path / "ledger.jsonl"]).notes
    assert f"{A}: reads failed 2 times: GPU is lost" in notes
    assert f"{A}: the counter fell: driver reloaded, once: what it used across that is not known" in notes
