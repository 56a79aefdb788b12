"""Crossings, ratios and their intervals, on curves whose answers are known exactly."""

import pytest

from moe.compare import compare


def at(comparison, name):
    """The JSON of one run's crossing."""
    return next(run["at_loss"] for run in comparison.to_json()["runs"] if run["name"] == name)


@pytest.fixture
def pair(make_run, steps):
    """An MoE at 128 tokens/s and 200 W against a dense model at 256 tokens/s and 300 W."""
    return (
        make_run("moe", steps(4, 3, 2), rate=128, power_w=200),
        make_run("dense", steps(5, 4, 3), rate=256, power_w=300),
    )


def test_costs_are_linear_between_the_two_evaluations_around_the_loss(pair):
    comparison = compare([pair[0]], [pair[1]], at_loss=3.5)
    assert at(comparison, "moe") == {
        "loss": 3.5,
        "reached": True,
        "tokens": 1920,
        "device_hours": pytest.approx(15 / 3600),
        "energy_j": pytest.approx(3000),
    }
    assert at(comparison, "dense")["tokens"] == 3200
    assert at(comparison, "dense")["device_hours"] == pytest.approx(12.5 / 3600)
    assert at(comparison, "dense")["energy_j"] == pytest.approx(3750)


def test_a_ratio_is_the_baselines_cost_over_the_runs(pair):
    ratios = compare([pair[0]], [pair[1]], at_loss=3.5).to_json()["ratios"]
    assert list(ratios) == ["tokens", "device_hours", "energy"]
    assert ratios["tokens"]["value"] == pytest.approx(5 / 3)
    assert ratios["device_hours"]["value"] == pytest.approx(12.5 / 15)
    assert ratios["energy"]["value"] == pytest.approx(3750 / 3000)
    assert {ratio["n"] for ratio in ratios.values()} == {1}
    assert all("seed-to-seed variation is not included" in ratio["method"] for ratio in ratios.values())


def test_interval_spans_the_bracketing_evaluations(pair):
    ratio = compare([pair[0]], [pair[1]], at_loss=3.5).ratios["tokens"].span
    assert (ratio.low, ratio.high) == (2560 / 2560, 3840 / 1280)


def test_standard_error_widens_the_interval_to_the_shifted_crossings(make_run, steps):
    run = make_run("moe", steps(6, 5, 4, 3, 2, error=1.25 / 1.96))
    span = compare([run], at_loss=3.5).entries[0].crossing.costs["tokens"]
    assert span.value == pytest.approx(3.5 * 1280)
    assert span.low == pytest.approx(2.25 * 1280)
    assert span.high == pytest.approx(4.75 * 1280)


def test_default_loss_is_the_lowest_that_every_run_reached(pair):
    assert compare([pair[0]], [pair[1]]).at_loss == 3.0


def test_default_loss_leaves_room_for_the_standard_error_so_that_every_interval_is_closed(make_run, steps):
    moe = make_run("moe", steps(4, 3, 2, error=0.05))
    dense = make_run("dense", steps(5, 4, 3, error=0.05))
    comparison = compare([moe], [dense])
    assert comparison.at_loss == pytest.approx(3 + 1.96 * 0.05)
    assert all(ratio.span.low > 0 and ratio.span.high is not None for ratio in comparison.ratios.values())


def test_a_loss_never_reached_is_said_and_never_extrapolated(pair):
    comparison = compare([pair[0]], [pair[1]], at_loss=2.5)
    assert at(comparison, "dense") == {
        "loss": 2.5,
        "reached": False,
        "tokens": None,
        "device_hours": None,
        "energy_j": None,
    }
    assert at(comparison, "moe")["reached"]
    assert comparison.ratios == {}
    assert (
        "dense never reached 2.5 nats per token; its best evaluation is 3, and nothing is extrapolated."
        in comparison.notes
    )
    assert "No baseline reached 2.5 nats per token, so there is no ratio at this loss." in comparison.notes


def test_interval_is_open_when_the_standard_error_allows_that_the_loss_was_not_reached(make_run, steps):
    moe, dense = make_run("moe", steps(4, 3, 2)), make_run("dense", steps(5, 4, 3, error=0.1))
    ratio = compare([moe], [dense], at_loss=3.0).to_json()["ratios"]["tokens"]
    assert ratio["value"] == pytest.approx(3840 / 2560)
    assert ratio["low"] == pytest.approx(2560 / 2560)
    assert ratio["high"] is None
    ratio = compare([dense], [moe], at_loss=3.0).to_json()["ratios"]["tokens"]
    assert ratio["low"] == 0


def test_first_evaluation_below_the_loss_is_an_upper_bound(pair):
    comparison = compare([pair[0]], at_loss=4.5)
    span = comparison.entries[0].crossing.costs["tokens"]
    assert (span.value, span.low, span.high) == (1280, 0, 1280)
    assert any("nothing bounds its cost from below" in note for note in comparison.notes)


def test_an_evaluation_before_the_first_step_bounds_the_cost_from_below(make_run, steps):
    """A crossing between tokens 0 and 1280: its cost may be near nothing, so the ratio's upper end is open."""
    moe = make_run("moe", [(0, 5.0), *steps(3, 2)])
    dense = make_run("dense", [(0, 5.0), *steps(4, 3)])
    comparison = compare([moe], [dense], at_loss=3.5)
    span = comparison.entries[0].crossing.costs["tokens"]
    assert (span.value, span.low, span.high) == (0.75 * 1280, 0, 1280)
    ratio = comparison.ratios["tokens"].span
    assert (ratio.value, ratio.low, ratio.high) == (1.5 / 0.75, 1, None)
    assert "An interval is open where no evaluation bounds it." in comparison.notes
    assert not any("from below" in note for note in comparison.notes)


def test_first_crossing_counts_even_when_the_loss_rises_again(make_run, steps):
    run = make_run("moe", steps(4, 3, 3.8, 2))
    assert at(compare([run], at_loss=3.5), "moe")["tokens"] == 1.5 * 1280


def test_verdict_names_the_cheaper_side_also_when_it_is_the_baseline(pair):
    notes = compare([pair[0]], [pair[1]], at_loss=3.5).notes
    assert notes[0].startswith("moe reached 3.5 nats per token with 0.60x the tokens of dense (0.33 to 1.00)")
    assert notes[1].startswith("dense reached 3.5 nats per token with 0.83x the device-hours of moe (0.50 to 1.50)")
    assert "the interval includes 1, so this does not tell them apart" in notes[1]


def test_verdict_is_plain_when_the_interval_excludes_one(make_run, steps):
    moe = make_run("moe", steps(4, 3, 2))
    dense = make_run("dense", [(100 * tokens, loss, error) for tokens, loss, error in steps(4, 3, 2)])
    assert compare([moe], [dense], at_loss=3.5).notes[0] == (
        "moe reached 3.5 nats per token with 0.01x the tokens of dense (0.01 to 0.02)."
    )
