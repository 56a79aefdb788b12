"""Runs that differ in seed alone stand on one side together: medians, and an interval that spans them."""

import json

import pytest

from moe.compare import compare


@pytest.fixture
def seeds(make_run, steps):
    """Three seeds of an MoE that reach 3.5 after 1.25, 1.5 and 2.5 evaluations, and one dense run after 3.5."""
    runs = [
        make_run("moe0", steps(3.75, 2.75, 2)),
        make_run("moe1", steps(4, 3, 2)),
        make_run("moe2", steps(5, 4, 3)),
    ]
    for seed, run in enumerate(runs):
        config = json.loads((run / "config.json").read_text())
        config["run"] = {"name": run.name, "seed": seed}
        (run / "config.json").write_text(json.dumps(config))
    return runs, make_run("dense", steps(6, 5, 4, 3), model={"intermediate_size": 64})


def test_ratio_is_of_medians_and_its_interval_spans_the_seeds(seeds):
    runs, dense = seeds
    ratio = compare(runs, [dense], at_loss=3.5).ratios["tokens"]
    assert ratio.span.value == pytest.approx(3.5 / 1.5)
    assert (ratio.span.low, ratio.span.high) == (3 / 3, 4 / 1)
    assert (ratio.n, ratio.run) == (1, "moe0 (median of 3 runs)")
    assert "Medians of 3 and 1 runs" in ratio.method


def test_seeds_of_a_baseline_are_one_rung_so_that_the_luckiest_does_not_stand_for_all(seeds):
    runs, dense = seeds
    ratio = compare([dense], runs, at_loss=3.5).ratios["tokens"]
    assert ratio.span.value == pytest.approx(1.5 / 3.5)
    assert ratio.baseline == "moe0 (median of 3 runs)"
    assert "cheapest" not in ratio.method


def test_only_the_first_seed_carries_the_ratios(seeds):
    runs, dense = seeds
    comparison = compare(runs, [dense], at_loss=3.5)
    assert [bool(entry.ratios) for entry in comparison.entries] == [True, False, False, False]
    assert sum("moe0 (median of 3 runs) reached" in note for note in comparison.notes) == 3


def test_a_seed_that_never_reached_the_loss_leaves_no_median(seeds):
    runs, dense = seeds
    assert compare(runs, [dense], at_loss=3.0).ratios
    assert not compare([dense], runs, at_loss=2.5).ratios


@pytest.mark.parametrize("other", [{"environment": {"device_name": "other"}}, {"model": {"intermediate_size": 64}}])
def test_another_machine_or_configuration_is_another_side(seeds, make_run, steps, other):
    runs, dense = seeds
    odd = make_run("odd", steps(4, 3), **other)
    (odd / "config.json").write_text((odd / "config.json").read_text().replace('"x"', '"odd", "seed": 9'))
    comparison = compare([*runs, odd], [dense], at_loss=3.5)
    assert comparison.ratios["tokens"].run == "moe0 (median of 3 runs)"
    assert comparison.entries[3].ratios["tokens"].run == "odd"


def test_a_repeated_seed_is_another_side(make_run, steps):
    paths = [make_run("a", steps(4, 3)), make_run("b", steps(4, 3))]
    comparison = compare(paths, [make_run("c", steps(4, 3))])
    assert [bool(entry.ratios) for entry in comparison.entries] == [True, True, False]
