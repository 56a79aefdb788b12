"""Grid and price series joined with the times at which a run used its energy."""

import json
import random
from datetime import UTC, datetime, timedelta

import pytest

from moe.energy import fold_ledgers
from moe.energy.footprint import Stated, footprint_of
from moe.energy.footprint.formats import read_intensities
from moe.energy.footprint.profile import EnergyProfile
from moe.energy.footprint.series import Point, Series
from moe.errors import ConfigError

MIDNIGHT = datetime(2025, 1, 1, tzinfo=UTC)
HOUR_NS = 3600 * 10**9
MIDNIGHT_NS = round(MIDNIGHT.timestamp()) * 10**9
KWH = 3.6e9  # millijoules


def utc(hours: float) -> str:
    return (MIDNIGHT + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


def csv_of(values: dict[float, float], column: str = "g_per_kwh") -> str:
    return "\n".join([f"utc,{column}", *(f"{utc(hour)},{value}" for hour, value in values.items())]) + "\n"


@pytest.fixture
def carbon(tmp_path):
    """Location-based carbon of a folded run with the text of a series file: (value, low, high), and its notes."""

    def work_out(fold, text, name="series.csv"):
        (tmp_path / name).write_text(text)
        footprint = footprint_of(fold, Stated(grid=str(tmp_path / name)))
        amount, energy = footprint.numbers["carbon_location"].amount, footprint.numbers["energy_it"].amount
        return amount.value, amount.low / energy.low, amount.high / energy.high, footprint

    return work_out


def test_energy_is_spread_evenly_between_two_readings(new_segment, tmp_path, carbon):
    """6 kWh from 0:30 to 2:00, then none to 3:00, then 1 kWh: 2 kWh fall into hour 0, 4 into hour 1, 1 into hour 3.
    2 x 100 + 4 x 200 + 0 x 900 + 1 x 400 = 1400 g over 7 kWh: 200 g/kWh."""
    segment = new_segment(1800)
    for hour, kwh in ((0.5, 0), (2, 6), (3, 6), (4, 7)):
        segment.read(hour * 3600, kwh * KWH)
    segment.end(4 * 3600)
    fold = fold_ledgers([tmp_path / "ledger.jsonl"])
    value, low, high, footprint = carbon(fold, csv_of({0: 100, 1: 200, 2: 900, 3: 400, 4: 1}))
    assert value == pytest.approx(1400)
    assert (low, high) == (pytest.approx(200), pytest.approx(200))
    assert footprint.factors["grid_carbon"].kind == ("average or marginal not stated, lifecycle or direct not stated")
    assert "bounded" not in " ".join(footprint.notes)


def test_a_price_by_time_is_joined_alike_and_facility_energy_pays_it(run, tmp_path):
    """10 kWh evenly over 4 h at 0.1, 0.2, 0.3, 0.4: 2.5 kWh each, 2.5 in all; with PUE 1.2, 3."""
    (tmp_path / "prices.csv").write_text(csv_of({0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}, "price_per_kwh"))
    said = Stated(pue="1.2", grid="0", price_kwh=str(tmp_path / "prices.csv"))
    assert footprint_of(run(), said).numbers["cost_energy"].amount.value == pytest.approx(3)


def test_a_price_may_be_below_zero(run, tmp_path):
    """Day-ahead markets pay at times: 10 kWh, half of them at -0.1 and half at 0.3, cost 1; all at -0.1 cost -1."""
    path = tmp_path / "prices.csv"
    path.write_text(csv_of({0: -0.1, 2: 0.3}, "price_per_kwh"))
    assert footprint_of(run(), Stated(price_kwh=str(path))).numbers["cost_energy"].amount.value == pytest.approx(1)
    path.write_text(csv_of({0: -0.1, 4: 0.3}, "price_per_kwh"))
    amount = footprint_of(run(), Stated(price_kwh=str(path))).numbers["cost_energy"].amount
    assert (amount.low, amount.value, amount.high) == pytest.approx((-1.05, -1.0, -0.95))


def test_nodes_and_time_zones_meet_in_utc(new_segment, tmp_path, carbon):
    """One node in hour 0, another in hour 1; the file tells its hours in the time of Berlin."""
    for file, hour in (("ledger.jsonl", 0), ("ledger.node1.jsonl", 1)):
        segment = new_segment(hour * 3600, file, devices=(f"GPU-{hour}",))
        segment.read(hour * 3600, 0, f"GPU-{hour}")
        segment.read((hour + 1) * 3600, KWH, f"GPU-{hour}")
        segment.end((hour + 1) * 3600)
    fold = fold_ledgers([tmp_path / "ledger.jsonl", tmp_path / "ledger.node1.jsonl"])
    text = "utc,g_per_kwh\n2025-01-01T01:00+01:00,100\n2025-01-01T02:00+01:00,300\n"
    assert carbon(fold, text)[0] == pytest.approx(400)


def test_what_a_killed_segment_used_counts_right_after_its_last_reading(new_segment, tmp_path, carbon):
    """Killed at 0:59:58 and gone on at 2:00: 5 s of the lost energy are billed, 2 of them in hour 0, 3 in hour 1."""
    first = new_segment()
    first.read(0, 0)
    first.read(3598, KWH)
    first.close()
    second = new_segment(7200)
    second.read(7200, KWH + 3602e6)  # a kilowatt all the while: 5 kJ are billed
    second.read(7300, KWH + 3602e6)
    second.end(7300)
    fold = fold_ledgers([tmp_path / "ledger.jsonl"])
    assert fold.segments[1].unattributed_j == 5000
    value = carbon(fold, csv_of({0: 0, 1: 3600, 2: 0}))[0]
    assert value == pytest.approx(3000 * 3.6e6 / KWH)


def test_a_gap_is_bounded_by_the_series_and_told(run, carbon):
    """10 kWh over 4 h; hour 2 has no value: 7.5 kWh at a mean of 200, and 2.5 kWh at 100 to 300.
    Low (1500 + 250) / 10 = 175 g/kWh, high (1500 + 750) / 10 = 225."""
    value, low, high, footprint = carbon(run(), csv_of({0: 100, 1: 200, 3: 300}))
    assert value == pytest.approx(2000)
    assert (low, high) == (pytest.approx(175), pytest.approx(225))
    (note,) = (note for note in footprint.notes if "bounded" in note)
    assert "no value for 25.00% of the run's energy: bounded by the series' own 100 to 300 g/kWh" in note


def test_energy_that_no_interval_covers_at_all_has_bounds_and_no_value(new_segment, tmp_path, carbon):
    """All energy in hour 0, the series knows the idle hour 1 alone."""
    segment = new_segment()
    for hour, kwh in ((0, 0), (1, 1), (2, 1)):
        segment.read(hour * 3600, kwh * KWH)
    segment.end(7200)
    value, low, high, _ = carbon(fold_ledgers([tmp_path / "ledger.jsonl"]), csv_of({1: 100, 1.5: 300}))
    assert (value, low, high) == (None, pytest.approx(100), pytest.approx(300))


# the same four hours in every format: 100, 200, 300 and 400 g/kWh
HOURS = {0: 100.0, 1: 200.0, 2: 300.0, 3: 400.0}
LB_PER_MWH = 1000 / 453.59237
MAPS = [{"datetime": utc(h), "carbonIntensity": g, "emissionFactorType": "direct"} for h, g in HOURS.items()]
WATTTIME = [{"point_time": utc(h), "value": g * LB_PER_MWH} for h, g in HOURS.items()]
NESO = [
    {
        "from": utc(h)[:16] + "Z",
        "to": utc(h + 1)[:16] + "Z",
        "intensity": {"forecast": 999 if h else g, "actual": g if h else None, "index": "high"},
    }
    for h, g in HOURS.items()
]
ROWS = "".join(f"{line},marginal,direct\n" for line in csv_of(HOURS).splitlines()[1:])
CSV = f"utc,g_per_kwh,signal,factor_type\n{ROWS}"
ANSWERS = {
    "csv": (CSV, "marginal, direct"),
    "maps-history": (json.dumps({"zone": "DE", "history": MAPS}), "average, direct"),
    "maps-past-range": (json.dumps({"zone": "DE", "data": MAPS}), "average, direct"),
    "watttime-moer": (
        json.dumps({"data": WATTTIME, "meta": {"signal_type": "co2_moer", "units": "lbs_co2_per_mwh", "region": "DE"}}),
        "marginal, lifecycle or direct not stated",
    ),
    "watttime-aoer": (
        json.dumps({"data": WATTTIME, "meta": {"signal_type": "co2_aoer", "units": "lbs_co2_per_mwh"}}),
        "average, lifecycle or direct not stated",
    ),
    "neso": (json.dumps({"data": NESO}), "average, direct"),
    "neso-regional": (json.dumps({"data": {"regionid": 3, "data": NESO}}), "average, direct"),
    "neso-regional-now": (
        json.dumps({"data": [{"regionid": 13, "shortname": "London", "data": NESO}]}),
        "average, direct",
    ),
}


@pytest.mark.parametrize("form", ANSWERS)
def test_every_format_gives_the_same_grams(run, carbon, form):
    """2.5 kWh in each hour: 2500 g; the file's kind of factor is kept and printed."""
    text, kind = ANSWERS[form]
    name = "answer.csv" if form == "csv" else "answer.json"
    value, low, high, footprint = carbon(run(), text, name)
    assert value == pytest.approx(2500)
    assert (low, high) == (pytest.approx(250), pytest.approx(250))
    assert footprint.factors["grid_carbon"].kind == kind
    assert kind in footprint.numbers["carbon_location"].method
    forecasts = [note for note in footprint.notes if "1 of the 4 values" in note and "are forecasts" in note]
    assert bool(forecasts) is form.startswith("neso")


def test_a_thousand_pounds_a_megawatt_hour_are_453_59237_grams_a_kilowatt_hour(tmp_path):
    rows = [{"point_time": utc(hour), "value": 1000} for hour in (0, 1)]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows, "meta": {"signal_type": "co2_moer"}}))
    assert read_intensities(tmp_path / "a.json").points[0].value == pytest.approx(453.59237)


def test_estimated_hours_of_electricity_maps_are_told_and_empty_ones_are_gaps(run, carbon):
    rows = [dict(row, isEstimated=index == 1) for index, row in enumerate(MAPS)]
    rows[2] = dict(rows[2], carbonIntensity=None)
    value, _, _, footprint = carbon(run(), json.dumps({"history": rows}), "maps.json")
    assert value == pytest.approx(10 * 700 / 3)
    assert any("1 of the 4 values" in note and "estimates" in note for note in footprint.notes)
    assert any("25.00%" in note for note in footprint.notes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param(csv_of(HOURS, "lbs_per_mwh"), "is in lbs_per_mwh: multiply by 0.45359237 and name", id="lbs"),
        pytest.param(csv_of(HOURS, "kg_per_kwh"), "is in kg_per_kwh: multiply by 1000 and name the column", id="kg"),
        pytest.param(csv_of(HOURS, "g_per_mwh"), "is in g_per_mwh: multiply by 0.001 and name the column", id="MWh"),
        pytest.param(csv_of(HOURS, "what"), "begins with 'utc,what': its first line must be utc,g_per_kwh", id="head"),
        pytest.param("", "begins with '': its first line must be utc,g_per_kwh", id="empty"),
        pytest.param("utc,g_per_kwh\nnoon,1\n", "has a line that is not utc,g_per_kwh (Invalid isoformat", id="time"),
        pytest.param(f"utc,g_per_kwh\n{utc(0)},much\n", "has a line that is not utc,g_per_kwh (could", id="word"),
        pytest.param(f"utc,g_per_kwh\n{utc(0)},1\n", "has 1 times: at least two tell how long a value", id="one row"),
        pytest.param(csv_of({0: 1, 1: -5}), "has -5 at 2025-01-01T01:00Z: a value is at least 0", id="negative"),
        pytest.param("utc,g_per_kwh\n" + "x" * 140_000, "is no CSV (field larger than field limit", id="long field"),
        pytest.param(csv_of({0: 1, 1: 5}) + f"{utc(1)},6\n", "has two values for 2025-01-01T01:00Z: keep", id="two"),
        pytest.param(
            csv_of({100: 1, 101: 5}),
            "covers 2025-01-05T04:00Z to 2025-01-05T06:00Z but the run lasted from 2025-01-01T00:00Z to "
            "2025-01-01T04:00Z: give a series of that time",
            id="another day",
        ),
        pytest.param("{", "is no JSON (Expecting property name", id="torn"),
        pytest.param("[]", "is not as Electricity Maps, WattTime v3 or NESO write it (AttributeError", id="a list"),
        pytest.param('{"data": []}', "is not as Electricity Maps, WattTime v3 or NESO write it (IndexError", id="none"),
        pytest.param('{"data": [{"x": 1}]}', "write it (KeyError 'x'): save the service's answer", id="stranger"),
        pytest.param(
            json.dumps({"history": [MAPS[0], dict(MAPS[1], emissionFactorType="lifecycle")]}),
            "mixes emissionFactorType direct and lifecycle: give one kind in a file",
            id="mixed",
        ),
        pytest.param(
            json.dumps({"data": [{"from": utc(0), "to": utc(1), "regions": [{"regionid": 1}]}]}),
            "holds all regions: ask NESO for one, /regional/intensity/FROM/TO/regionid/ID",
            id="all regions",
        ),
        pytest.param(
            json.dumps({"data": [{"from": utc(0), "to": utc(4), "intensity": {"max": 9, "average": 5, "min": 1}}]}),
            "holds NESO's statistics: ask for /intensity/FROM/TO, which has every half hour",
            id="statistics",
        ),
        pytest.param(
            json.dumps({"error": {"code": "400 Bad Request", "message": "Please enter a valid start datetime"}}),
            "is the service's refusal (",
            id="refused",
        ),
        pytest.param(
            json.dumps({"data": WATTTIME, "meta": {"units": "usd_per_mwh"}}),
            "is in usd_per_mwh: ask WattTime for co2_moer or co2_aoer, in lbs_co2_per_mwh",
            id="health",
        ),
    ],
)
def test_a_series_that_cannot_be_used_is_one_sentence(run, carbon, text, sentence):
    with pytest.raises(ConfigError) as caught:
        carbon(run(), text)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("series ")
    assert "\n" not in str(caught.value)


def test_prices_in_another_unit_are_named(run, tmp_path):
    (tmp_path / "prices.csv").write_text(csv_of(HOURS, "price_per_mwh"))
    with pytest.raises(ConfigError, match=r"is in price_per_mwh: multiply by 0\.001 and name the column price_per_kwh"):
        footprint_of(run(), Stated(price_kwh=str(tmp_path / "prices.csv")))


@pytest.mark.parametrize("form", ANSWERS)
def test_a_mutilated_file_is_a_sentence_or_a_series(tmp_path, form):
    """Bytes dropped, doubled and changed at random: never another exception."""
    rng = random.Random(form)
    text, sentences, values = ANSWERS[form][0], [], []
    for _ in range(150):
        at, length = rng.randrange(len(text)), rng.randrange(30)
        torn = text[:at] + rng.choice(["", "9" * 400, "null", "-", "{}", text[at : at + 40]]) + text[at + length :]
        (tmp_path / "a.json").write_text(torn)
        try:
            values += [point.value for point in read_intensities(tmp_path / "a.json").points]
        except ConfigError as error:
            sentences.append(str(error))
    assert sentences
    assert values
    assert all("\n" not in sentence for sentence in sentences)
    assert all(0 <= value < float("inf") for value in values)


def test_a_run_that_used_no_energy_cannot_be_joined(run, carbon):
    with pytest.raises(ConfigError, match="cannot be joined with a run that used no energy: give a number"):
        carbon(run(kwh=0), csv_of(HOURS))


@pytest.mark.parametrize("seed", range(5))
def test_intervals_sum_to_the_total_and_segments_change_nothing(new_segment, tmp_path, seed):
    """Random readings of two devices and a random series with gaps: parts and what no interval covers make the total,
    and a ledger cut into segments at any of its readings gives the same carbon."""
    rng = random.Random(seed)
    moments = sorted({round(rng.uniform(0, 6 * 3600), 3) for _ in range(40)})
    energies = {uuid: [0.0] for uuid in ("GPU-a", "GPU-b")}
    for so_far in energies.values():
        for _ in moments[1:]:
            so_far.append(so_far[-1] + rng.choice([0, rng.uniform(0, 2e8)]))
    cuts = set(rng.sample(range(1, len(moments) - 1), 4))

    def fold_of(file: str, cuts: set[int]):
        segment = new_segment(moments[0], file, devices=tuple(energies))
        for index, at_s in enumerate(moments):
            for uuid, so_far in energies.items():
                segment.read(at_s, so_far[index], uuid)
            if index in cuts:
                segment.end(at_s)
                segment = new_segment(at_s, file, devices=tuple(energies))
                for uuid, so_far in energies.items():
                    segment.read(at_s, so_far[index], uuid)
        segment.end(moments[-1])
        return fold_ledgers([tmp_path / file])

    points = [
        Point(MIDNIGHT_NS + half * HOUR_NS // 2, MIDNIGHT_NS + (half + 1) * HOUR_NS // 2, rng.uniform(0, 900))
        for half in range(12)
        if rng.random() < 0.8
    ]
    series = Series.from_points("random", points, unit="g/kWh", kind="", source="")
    whole, cut = fold_of("whole.jsonl", set()), fold_of("cut.jsonl", cuts)
    assert len(cut.segments) == 5
    assert whole.total.energy_mj == cut.total.energy_mj
    profile = EnergyProfile.of_run(whole)
    joined = series.join(profile)
    covered_mj = sum(part.energy_mj for part in joined)
    gaps_mj = sum(
        profile.between(before, after)
        for before, after in zip(
            [0, *(point.end_ns for point in points)], [*(point.start_ns for point in points), 2**62], strict=True
        )
    )
    assert covered_mj + gaps_mj == pytest.approx(whole.total.energy_mj, rel=1e-12)
    factor = series.over(profile, whole.total.energy_mj)
    assert factor.amount.value * covered_mj == pytest.approx(sum(p.energy_mj * p.point.value for p in joined))
    assert factor.amount.low <= factor.amount.value <= factor.amount.high
    again = series.over(EnergyProfile.of_run(cut), cut.total.energy_mj).amount
    for one, other in zip(vars(factor.amount).values(), vars(again).values(), strict=True):
        assert other == pytest.approx(one, rel=1e-9)
