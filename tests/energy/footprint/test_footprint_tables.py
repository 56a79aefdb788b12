"""The shipped factors: whole rows, no doubles, and a page that shows each of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe.energy.footprint.factors import TABLES, factor_of, matching, table

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_value_or_range_unit_year_source_and_licence(name):
    rows = table(name)
    assert rows
    for row in rows:
        amount = row.amount
        assert 0 <= amount.low <= (amount.high if amount.value is None else amount.value) <= amount.high, row.name
        assert amount.value is not None or amount.low < amount.high, row.name
        assert all((row.kind, row.code, row.name, row.unit, row.source, row.licence)), row
        assert re.fullmatch(r"20\d\d", row.year), row.name


@pytest.mark.parametrize("name", [name for name in TABLES if name != "hardware"])
def test_a_word_means_one_row(name):
    """No code, other word or name stands for two rows."""
    words = [word for row in table(name) for word in set(row.words)]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("driver_name", "code"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H800", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A800 80GB PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A10", None),
    ],
)
def test_hardware_is_found_by_the_drivers_name(driver_name, code):
    """Cards are no eighth of an HGX board or server, and have no row."""
    row = matching("embodied_accelerator", driver_name)
    assert (row is None) if code is None else row.name.startswith(code)
    if code is None:
        assert matching("embodied_server", driver_name) is matching("mass", driver_name) is None


def test_the_grid_table_has_the_world_its_countries_and_the_us_subregions():
    """Life-cycle factors of countries, stack factors of eGRID's subregions, the two told apart by their kind."""
    assert factor_of("--grid", "grid_carbon", "World").amount.value == 472.94
    assert factor_of("--grid", "grid_carbon", "UK").code == "GBR"
    assert factor_of("--grid", "grid_carbon", "FR").kind == "average, lifecycle"
    assert factor_of("--grid", "grid_carbon", "CAMX").kind == "average, direct"
    water = {row.code for row in table("grid_water")}
    assert water <= {row.code for row in table("grid_carbon")}


def test_the_page_shows_every_factor():
    """`scripts/factors --write` mends it."""
    printed = subprocess.run(
        [sys.executable, str(ROOT / "scripts/factors")], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    page = (ROOT / "docs" / "footprint.md").read_text(encoding="utf-8")
    assert f"<!-- factors -->\n{printed}<!-- /factors -->" in page
    for name in TABLES:
        for row in table(name):
            assert f"| {row.name} |" in printed
