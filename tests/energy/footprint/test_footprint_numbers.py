"""Footprints worked out by hand: 10 kWh (band 5 %) on one H100 in 4 hours."""

import json
from pathlib import Path

import pytest

from moe.energy import fold_ledgers
from moe.energy.footprint import Footprint, Stated, footprint_of
from moe.energy.footprint.factors import matching
from moe.energy.footprint.quantity import Interval
from moe.errors import ConfigError


def numbers(footprint: Footprint, name: str) -> list[float | None]:
    amount = footprint.numbers[name].amount
    return [amount.value, amount.low, amount.high]


def near(*values: float | None) -> list[object]:
    """Equal but for the rounding of floats."""
    return [None if value is None else pytest.approx(value, rel=1e-9) for value in values]


def test_energy_carbon_and_money(run):
    """10 kWh x 1.2 = 12 kWh; x 350 g = 4200 g; x 50 g of a contract = 600 g; x 0.25 = 3; 4 device-hours x 2 = 8."""
    footprint = footprint_of(run(), Stated(pue="1.2", grid="350", market=50, price=2, price_kwh="0.25"))
    assert numbers(footprint, "energy_it") == near(10, 9.5, 10.5)
    assert numbers(footprint, "energy_facility") == near(12, 11.4, 12.6)
    assert numbers(footprint, "carbon_location") == near(4200, 3990, 4410)
    assert numbers(footprint, "carbon_market") == near(600, 570, 630)
    assert numbers(footprint, "cost_energy") == near(3, 2.85, 3.15)
    assert numbers(footprint, "cost_devices") == near(8, 8, 8)
    assert "cost" not in footprint.numbers, "two ways to pay are never added"


def test_without_a_pue_the_metered_scope_stays(run):
    """10 kWh x 350 g, and the scope says it is the GPU's alone."""
    footprint = footprint_of(run(), Stated(grid="350"))
    assert "energy_facility" not in footprint.numbers
    assert numbers(footprint, "carbon_location") == near(3500, 3325, 3675)
    assert footprint.numbers["carbon_location"].scope == "gpu"
    assert footprint_of(run(), Stated(pue="1.2")).numbers["carbon_location"].scope == "facility of gpu"


def test_water_is_counted_by_it_energy_at_the_site_and_by_facility_energy_at_the_plant(run):
    """0.3 x 10 = 3 L, not 3.6 L; Germany's plants 1.947 x 12 = 23.364 L; 26.364 L together, all consumed."""
    footprint = footprint_of(run(), Stated(pue="1.2", grid="DE", wue=("0.3", "withdrawn=0.5")))
    assert numbers(footprint, "water_consumed_site") == near(3, 2.85, 3.15)
    assert numbers(footprint, "water_consumed_grid") == near(23.364, 22.1958, 24.5322)
    assert numbers(footprint, "water_consumed") == near(26.364, 25.0458, 27.6822)
    assert numbers(footprint, "water_withdrawn_site") == near(5, 4.75, 5.25)
    source = footprint.numbers["water_consumed"].source
    assert source.startswith("counter; stated: --pue; stated: --wue; "), "each part's once"
    assert "water_withdrawn" not in footprint.numbers, "what plants withdraw is in no table"
    for name, quantity in footprint.numbers.items():
        if name.startswith("water"):
            assert name.split("_")[1] in quantity.method
    assert not any("water" in name for name in footprint_of(run(), Stated(grid="350")).numbers)


def test_embodied_carbon_is_amortised_over_real_use(run):
    """4 h of 4 x 8760 x 0.5 = 17520 h is 1/4380 of a device: 164 kg -> 37.4 g of the board, 273 kg -> 62.3 g at most;
    of the whole server 462.5 to 876.5 kg -> 105.6 to 200.1 g; of 16.30625 kg 3.72 g become waste."""
    footprint = footprint_of(run(), Stated(lifetime=4, utilisation=0.5))
    assert numbers(footprint, "embodied_accelerator") == near(164e3 / 4380, 164e3 / 4380, 273e3 / 4380)
    assert numbers(footprint, "embodied_server") == near(None, 462.5e3 / 4380, 876.5e3 / 4380)
    assert numbers(footprint, "e_waste") == near(*[16306.25 / 4380] * 3)
    # 3 to 6 years of the table at full use: 4 h of 26280 to 52560 h
    footprint = footprint_of(run(), Stated(utilisation=1))
    assert numbers(footprint, "embodied_accelerator") == near(None, 164e3 * 4 / 52560, 273e3 * 4 / 26280)
    assert not any("embodied" in name for name in footprint_of(run(), Stated()).numbers)


def test_several_devices_and_segments_are_reserved_together(new_segment, tmp_path):
    """Two devices for an hour, then one for two more: four device-hours, the same share as above."""
    first = new_segment(0, devices=("GPU-a", "GPU-b"))
    first.end(3600)
    second = new_segment(7200)
    second.end(14400)
    footprint = footprint_of(fold_ledgers([tmp_path / "ledger.jsonl"]), Stated(lifetime=4, utilisation=0.5, price=2))
    assert numbers(footprint, "e_waste") == near(*[16306.25 / 4380] * 3)
    assert numbers(footprint, "cost_devices") == near(8, 8, 8)


def test_sci_adds_the_location_and_the_whole_server(run):
    """4200 g + 105.6 to 200.1 g a run; twice that per 1e9 tokens when the run made 5e8. The contract is not in it."""
    said = Stated(pue="1.2", grid="350", market=0, lifetime=4, utilisation=0.5)
    footprint = footprint_of(run(tokens=500_000_000), said)
    low, high = 3990 + 462.5e3 / 4380, 4410 + 876.5e3 / 4380
    assert numbers(footprint, "sci_run") == near(None, low, high)
    assert numbers(footprint, "sci_per_1e9_tokens") == near(None, 2 * low, 2 * high)
    assert "market" not in footprint.numbers["sci_run"].method
    assert "sci_per_1e9_tokens" not in footprint_of(run(), said).numbers


def test_an_unknown_place_is_a_range_over_the_table_and_never_a_value(run):
    """20.83 (Lesotho) to 1306.3 g (Turkmenistan): the ends of the shipped countries."""
    footprint = footprint_of(run(), Stated())
    assert numbers(footprint, "carbon_location") == near(None, 9.5 * 20.83, 10.5 * 1306.3)
    assert any("location is not stated" in note for note in footprint.notes)


@pytest.mark.parametrize("zone", ["DE", "de", "DEU", "Germany", "germany"])
def test_a_country_has_several_names(run, zone):
    assert numbers(footprint_of(run(), Stated(grid=zone)), "carbon_location")[0] == pytest.approx(3420.6)


def test_cooling_and_providers_name_their_own_pue(run):
    """Liquid: 1.05 to 1.15 and no value; Google's fleet: 1.09, its regions 1.07 to 1.16."""
    liquid = footprint_of(run(), Stated(cooling="liquid", grid="100"))
    assert numbers(liquid, "energy_facility") == near(None, 9.5 * 1.05, 10.5 * 1.15)
    google = footprint_of(run(), Stated(pue="google", grid="100", wue=("aws",)))
    assert numbers(google, "energy_facility") == near(10.9, 9.5 * 1.07, 10.5 * 1.16)
    assert numbers(google, "water_withdrawn_site") == near(1.2, 9.5 * 0.01, 10.5 * 2.75)


def test_plain_words_only_on_request(run):
    """12 kWh are 0.41 days of a US home (10,715 kWh a year); 4200 g are a third of a car's day (4.6 t a year)."""
    said = Stated(pue="1.2", grid="350")
    assert not any(name.startswith("plain") for name in footprint_of(run(), said).numbers)
    footprint = footprint_of(run(), Stated(pue="1.2", grid="350", plain=True))
    assert numbers(footprint, "plain_household")[0] == pytest.approx(12 / (10715 / 365))
    assert numbers(footprint, "plain_car")[0] == pytest.approx(4200 / (4.6e6 / 365))


@pytest.mark.parametrize(("source", "energy"), [("counter", "measured"), ("declared", "estimate")])
def test_every_number_and_factor_says_what_it_is(run, source, energy):
    """Unit, source, scope, method and band everywhere; an estimate of energy is one in all that is made of it."""
    said = Stated(
        pue="1.2", grid="DE", market=0, wue=("0.3",), price=2, price_kwh="0.2", lifetime=4, utilisation=0.5, plain=True
    )
    footprint = footprint_of(run(tokens=10**9, source=source), said)
    printed = json.loads(json.dumps(footprint.to_json(), allow_nan=False))
    assert len(printed["numbers"]) == 16
    for name, number in printed["numbers"].items():
        assert number.keys() == {"value", "low", "high", "unit", "source", "scope", "method", "energy"}
        assert all(number[key] for key in ("unit", "source", "scope", "method"))
        assert number["low"] <= (number["low"] if number["value"] is None else number["value"]) <= number["high"]
        free_of_energy = name.startswith("embodied") or name in ("e_waste", "cost_devices")
        assert number["energy"] == (None if free_of_energy else energy)
        assert free_of_energy or source in number["source"]
    for factor in printed["factors"].values():
        assert factor.keys() == {"name", "kind", "value", "low", "high", "unit", "year", "source", "licence"}
        assert all(factor[key] for key in ("source", "unit"))


def test_energy_that_was_never_read_leaves_out_what_depends_on_it(new_segment, tmp_path):
    new_segment().end(3600)
    footprint = footprint_of(fold_ledgers([tmp_path / "ledger.jsonl"]), Stated(grid="DE", price=2))
    assert list(footprint.numbers) == ["cost_devices"]
    assert footprint.notes == ["no energy was read: its carbon, water and price are not known"]


def test_time_the_meter_did_not_see_is_told(new_segment, tmp_path):
    """Read for two of four hours: nothing is made up for the rest."""
    segment = new_segment()
    segment.read(0, 0)
    segment.read(7200, 3.6e9)
    segment.end(14400)
    footprint = footprint_of(fold_ledgers([tmp_path / "ledger.jsonl"]), Stated(grid="100"))
    assert numbers(footprint, "carbon_location")[0] == pytest.approx(100)
    assert "the energy is known for 50.0% of the time: the rest is in no number" in footprint.notes


def test_a_ledger_that_begins_later_has_no_sci_per_token(new_segment, tmp_path):
    """Tokens of the whole lineage would share the carbon of its last part."""
    segment = new_segment(resumed=100)
    segment.read(0, 0)
    segment.mark(1, step=1, tokens=10**9, idle=1.0)
    segment.read(14400, 36e9)
    segment.end(14400)
    footprint = footprint_of(fold_ledgers([tmp_path / "ledger.jsonl"]), Stated(grid="350", utilisation=0.5))
    assert "sci_run" in footprint.numbers
    assert "sci_per_1e9_tokens" not in footprint.numbers
    assert "the ledger begins at step 100: the SCI per token is left out" in footprint.notes


def test_embodied_sources_have_one_order(new_segment, tmp_path):
    """That of the devices, in every process."""
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")
    for start_s, name in enumerate(names):
        segment = new_segment(start_s * 3600, name=name)
        segment.read(start_s * 3600, 0)
        segment.end(start_s * 3600 + 1800)
    numbers_of = footprint_of(fold_ledgers([tmp_path / "ledger.jsonl"]), Stated(utilisation=0.5)).numbers
    for number, kind in (("embodied_accelerator",) * 2, ("embodied_server",) * 2, ("e_waste", "mass")):
        assert numbers_of[number].source == "; ".join(matching(kind, name).source for name in names)


def test_hardware_in_no_table_is_left_out_and_named(run):
    for device, called in (({"name": "NVIDIA GeForce RTX 4090"}, "RTX 4090"), ({"kind": "cpu"}, "hosts without a GPU")):
        footprint = footprint_of(run(**device), Stated(utilisation=0.5))
        assert not footprint.numbers.keys() & {"embodied_server", "embodied_accelerator", "e_waste", "sci_run"}
        assert any(called in note and "left out" in note for note in footprint.notes)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (Stated(pue="0.9"), "--pue 0.9 must be a number of at least 1 (ratio): correct it"),
        (Stated(pue="gogle"), "--pue gogle is in no row of the shipped table: the nearest is google (Google, fleet); "),
        (Stated(pue="1.2", cooling="air"), "--pue and --cooling both state the PUE: give one of them"),
        (Stated(cooling="liqid"), "--cooling liqid is in no row of the shipped table: the nearest is liquid ("),
        (Stated(grid="-3"), "--grid -3 must be a number of at least 0 (g/kWh): correct it"),
        (Stated(grid="nan"), "--grid nan must be a number of at least 0 (g/kWh): correct it"),
        (
            Stated(grid="Germny"),
            "--grid Germny is in no row of the shipped table: the nearest is DEU (Germany); give a",
        ),
        (
            Stated(grid="gone.csv"),
            "series gone.csv cannot be read (No such file or directory): give a CSV or JSON file",
        ),
        (Stated(market=-1), "--market -1 must be a number of at least 0 (g/kWh): correct it"),
        (Stated(wue=("-1",)), "--wue -1 must be a number of at least 0 (L/kWh IT): correct it"),
        (Stated(wue=("0.3", "0.4")), "--wue 0.4 is a second number of water consumed at the site: give one of them"),
        (Stated(wue=("drunk=1",)), "--wue drunk=1 is in no row of the shipped table: the nearest is "),
        (Stated(price=-2), "--price -2 must be a number of at least 0 (currency/device-hour): correct it"),
        (Stated(price_kwh="-0.1"), "--price-kwh -0.1 must be a number of at least 0 (currency/kWh): correct it"),
        (Stated(price_kwh="cheap"), "--price-kwh cheap is neither a number nor a file: give one of them"),
        (Stated(lifetime=4), "--lifetime needs --utilisation: the share of its life the hardware works, such as 0.6"),
        (Stated(lifetime=0, utilisation=1), "--lifetime 0 must be above 0 years: correct it or leave it out"),
        (Stated(utilisation=60), "--utilisation 60 must be above 0 and at most 1: give a share, such as 0.6"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_factor_that_cannot_be_is_one_sentence(run, tmp_path, monkeypatch, said, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        footprint_of(run(), said)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_intervals_keep_the_worst_of_both():
    """The docstring's numbers; a quotient turns the divisor's ends round; an unknown value stays unknown."""
    assert Interval(2.0, 1.0, 3.0) * Interval(10.0, 10.0, 20.0) == Interval(20.0, 10.0, 60.0)
    assert Interval(6.0, 4.0, 8.0) / Interval(None, 1.0, 2.0) == Interval(None, 2.0, 8.0)
    assert Interval(10.0, 9.0, 11.0) * Interval(-2.0, -3.0, 1.0) == Interval(-20.0, -33.0, 11.0)
    assert Interval(1.0, 0.5, 2.0) + Interval(1.0, 1.0, 1.0) == Interval(2.0, 1.5, 3.0)


def test_the_page_says_what_is_computed():
    """docs/footprint.md names every number of a footprint."""
    page = (Path(__file__).parents[3] / "docs" / "footprint.md").read_text(encoding="utf-8")
    for name in ("carbon_location", "carbon_market", "water_consumed", "embodied_server", "e_waste", "sci_run"):
        assert f"`{name}" in page
