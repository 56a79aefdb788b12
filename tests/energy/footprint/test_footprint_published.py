"""Carbon and water of published training runs, from their own energy, PUE and factors.

Each row keeps the digits as printed. The tolerance is what those digits leave open: half a unit in the last place of
energy, factor and result. A wrong formula (PUE twice, PUE forgotten) is 8 to 20 % off; the rows close to 2 % or better.
"""

from typing import NamedTuple

import pytest

from moe.energy.footprint import Stated, footprint_of
from moe.energy.footprint.factors import Factor
from moe.energy.footprint.quantity import Interval
from moe.energy.footprint.water import water_of


class Published(NamedTuple):
    """MWh with or without PUE inside, g/kWh, tCO2e, as printed."""

    model: str
    energy_mwh: str
    has_pue: bool
    pue: str
    grid_g: str
    tco2e: str


LLAMA = "arXiv:2302.13971 Table 15"
PATTERSON = "arXiv:2104.10350 Table 4"
MORRISON = "arXiv:2503.05804 Table 2"
RUNS = [
    Published("LLaMA 7B", "36", True, "1.1", "385", "14"),  # LLAMA, also the next four
    Published("LLaMA 13B", "59", True, "1.1", "385", "23"),
    Published("LLaMA 33B", "233", True, "1.1", "385", "90"),
    Published("LLaMA 65B", "449", True, "1.1", "385", "173"),
    Published("OPT-175B", "356", True, "1.1", "385", "137"),
    Published("GPT-3", "1287", True, "1.1", "429", "552.1"),  # PATTERSON, also the next four
    Published("T5 11B", "85.7", True, "1.12", "545", "46.7"),
    Published("Meena", "232", True, "1.09", "415", "96.4"),
    Published("GShard-600B", "24.1", True, "1.09", "201", "4.8"),
    Published("Switch Transformer", "179", True, "1.1", "403", "72.2"),
    Published("Gopher", "1066.4", False, "1.08", "330", "380"),  # arXiv:2112.11446
    Published("PaLM", "3435.8", True, "1.08", "79", "271.43"),  # arXiv:2204.02311 appendix B
    Published("GLaM", "456", True, "1.11", "88", "40.2"),  # arXiv:2204.05149
    Published("BLOOM", "433.196", False, "1", "57", "24.69"),  # arXiv:2211.02001: dynamic energy, before PUE
    Published("OLMo 7B, LUMI", "135", False, "1.1", "0", "0"),  # arXiv:2402.00838 Table 6, also the next
    Published("OLMo 7B, MosaicML", "104", False, "1.1", "610", "70"),
    Published("OLMo 1B", "30", True, "1.2", "332", "10"),  # MORRISON, also the rest
    Published("OLMoE-1B-7B", "54", True, "1.2", "332", "18"),
    Published("OLMo 2 7B", "157", True, "1.2", "332", "52"),
    Published("OLMo 2 13B", "287.8", True, "1.12", "352", "101"),
]


def half_a_digit(printed: str) -> float:
    """How far a printed number can be from the one that was rounded."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def it_kwh(row: Published) -> float:
    return float(row.energy_mwh) * 1000 / (float(row.pue) if row.has_pue else 1)


@pytest.mark.parametrize("row", RUNS, ids=lambda row: row.model)
def test_published_carbon_follows_from_published_energy(run, row):
    """tCO2e = MWh x PUE x g/kWh / 1000."""
    footprint = footprint_of(run(kwh=it_kwh(row)), Stated(pue=row.pue, grid=row.grid_g))
    energy, grid = float(row.energy_mwh), float(row.grid_g)
    open_share = half_a_digit(row.energy_mwh) / energy + (half_a_digit(row.grid_g) / grid if grid else 0)
    tonnes = footprint.numbers["carbon_location"].amount.value / 1e6
    assert tonnes == pytest.approx(float(row.tco2e), abs=half_a_digit(row.tco2e) + open_share * float(row.tco2e))
    assert open_share < 0.035


@pytest.mark.parametrize(
    ("model", "litre_per_kwh", "kilolitre"),
    [("OLMo 1B", 1.29, "39"), ("OLMoE-1B-7B", 1.29, "70"), ("OLMo 2 7B", 1.29, "202"), ("OLMo 2 13B", 3.1, "892")],
)
def test_published_water_follows_from_published_energy(run, model, litre_per_kwh, kilolitre):
    """MORRISON: sites with a closed loop (WUE 0), so that all of it is E x PUE x the grid's water."""
    row = next(row for row in RUNS if row.model == model)
    footprint = footprint_of(run(kwh=it_kwh(row)), Stated(pue=row.pue, grid=row.grid_g))
    site = Factor(name="closed loop", amount=Interval.exactly(0), unit="L/kWh IT", source=MORRISON, kind="consumed")
    grid = Factor(name="grid", amount=Interval.exactly(litre_per_kwh), unit="L/kWh", source=MORRISON, kind="consumed")
    waters = water_of(
        footprint.numbers["energy_it"], footprint.numbers["energy_facility"], {"consumed": site}, {"consumed": grid}
    )
    open_share = half_a_digit(row.energy_mwh) / float(row.energy_mwh)
    expected = float(kilolitre)
    assert waters["water_consumed"].amount.value / 1000 == pytest.approx(expected, abs=0.5 + open_share * expected)
