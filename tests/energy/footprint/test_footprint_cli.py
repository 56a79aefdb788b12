"""`moe energy report` with factors, as a process on a ledger written by hand."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def report(run, tmp_path):
    """`moe energy report ledger.jsonl WORDS…` of 10 kWh in 4 hours on one H100."""
    run(tokens=10**9)

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe.cli", "energy", "report", "ledger.jsonl", *words]
        environment = {**os.environ, "COLUMNS": "160"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)

    return call


def test_the_commands_of_the_page(report, tmp_path):
    """docs/footprint.md's options all at once: every part of the JSON is there, and the notes go to stderr."""
    (tmp_path / "prices.csv").write_text("utc,price_per_kwh\n2025-01-01T00:00Z,0.1\n2025-01-01T02:00Z,0.3\n")
    words = "--pue 1.2 --grid DE --market 0 --wue 0.3 --wue withdrawn=0.4 --price 2.0 --price-kwh prices.csv"
    done = report(*words.split(), "--lifetime", "4", "--utilisation", "0.6", "--plain", "--json")
    assert done.returncode == 0, done.stderr
    footprint = json.loads(done.stdout)["footprint"]
    assert list(footprint) == ["numbers", "factors", "notes"]
    assert footprint["numbers"]["carbon_location"]["value"] == pytest.approx(12 * 342.06)
    assert footprint["numbers"]["cost_energy"]["value"] == pytest.approx(12 * 0.2)
    assert footprint["numbers"]["sci_per_1e9_tokens"]["low"] > 11.4 * 342.06
    assert footprint["factors"]["grid_carbon"]["licence"].startswith("CC BY 4.0")
    assert footprint["notes"] == done.stderr.splitlines()


def test_the_text_shows_bands_units_and_factors(report):
    """4200 g are printed as kilograms, with both ends; the factor's kind and source stand below."""
    text = report("--pue", "1.2", "--grid", "350", "--utilisation", "0.6").stdout
    for word in (
        "carbon location",
        "4.2 kgCO2e",
        "3.99 to 4.41",
        "facility of gpu",
        "embodied server",
        "stated: --grid",
    ):
        assert word in text
    assert "the energy is that of the GPUs alone" in text
    assert "an estimate" not in text


def test_each_scope_has_one_heading(report):
    """Numbers of the facility come before and behind those of the site's water: still one list each."""
    words = ("--pue", "1.2", "--grid", "DE", "--wue", "0.3", "--price", "2", "--price-kwh", "0.2")
    headings = [
        line for line in report(*words, "--utilisation", "0.6").stdout.splitlines() if line.startswith("footprint, ")
    ]
    assert len(headings) > 3
    assert len(headings) == len(set(headings))


def test_a_mistake_cannot_steer_the_terminal(report):
    assert report("--grid", "\x1b[2Jnowhere").stderr.startswith(
        "moe: --grid \N{REPLACEMENT CHARACTER}[2Jnowhere is in "
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--grid", "Germny"],
            "--grid Germny is in no row of the shipped table: the nearest is DEU (Germany); give a ",
        ),
        (["--price", "-2"], "--price -2 must be a number of at least 0 (currency/device-hour): correct it"),
        (["--pue", "0.5"], "--pue 0.5 must be a number of at least 1 (ratio): correct it"),
        (["--lifetime", "4"], "--lifetime needs --utilisation: "),
        (["--grid", "none.json"], "series none.json cannot be read (No such file or directory): give a CSV or JSON"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(report, words, sentence):
    done = report(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"moe: {sentence}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('{"v":1,"kind":"segment"', '{"v":2,"kind":"segment"', "line 1 has version 2: this program reads 1"),
        ('"energy_mj":0', '"energy_mj":9', "was altered: line 2 does not match the hash in line 3"),
    ],
    ids=["another version", "a broken chain"],
)
def test_a_ledger_that_cannot_be_trusted_gives_no_footprint(report, tmp_path, old, new, sentence):
    ledger = tmp_path / "ledger.jsonl"
    text = ledger.read_text()
    assert text.count(old) == 1
    ledger.write_text(text.replace(old, new))
    done = report("--grid", "DE")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"moe: ledger ledger.jsonl {sentence}")
    assert done.stderr.count("\n") == 1
