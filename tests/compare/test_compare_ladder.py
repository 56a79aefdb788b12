"""Several baselines are one ladder: what a run has to beat is the cheapest that reached the loss."""

import pytest

from moe.compare import compare


@pytest.fixture
def ladder(make_run, steps):
    """A small dense model, cheap but soon flat, and a large one; both slower in tokens than the MoE."""
    return (
        make_run("moe", steps(4, 3, 2), rate=128),
        make_run("small", steps(4.4, 3.8, 3.2), rate=512),
        make_run("large", steps(4.2, 3.4, 2.6), rate=64),
    )


def test_each_cost_names_the_baseline_that_reached_the_loss_most_cheaply(ladder):
    ratios = compare(ladder[:1], ladder[1:], at_loss=3.8).ratios
    assert (ratios["tokens"].baseline, ratios["device_hours"].baseline) == ("large", "small")
    assert ratios["tokens"].span.value == pytest.approx(1.5 / 1.2)
    assert ratios["device_hours"].span.value == pytest.approx((2 / 512) / (1.2 / 128))
    assert "cheapest of those that reached the loss (2 of 2)" in ratios["tokens"].method


def test_a_baseline_that_never_reached_the_loss_is_off_the_ladder(ladder):
    comparison = compare(ladder[:1], ladder[1:], at_loss=3.0)
    assert comparison.ratios["device_hours"].baseline == "large"
    assert comparison.ratios["device_hours"].span.value == pytest.approx((2.5 / 64) / (2 / 128))
    assert "cheapest of those that reached the loss (1 of 2)" in comparison.ratios["device_hours"].method
    assert any(note.startswith("small never reached 3 nats per token") for note in comparison.notes)


def test_interval_is_the_envelopes(ladder):
    """At 3.5 the small model crosses between evaluations 2 and 3, the other two between 1 and 2."""
    span = compare(ladder[:1], ladder[1:], at_loss=3.5).ratios["tokens"].span
    assert (span.low, span.high) == (1 / 2, 2 / 1)


def test_every_run_is_compared_with_the_whole_ladder_and_the_first_is_the_headline(ladder):
    comparison = compare([ladder[1], ladder[0]], [ladder[2]], at_loss=3.5)
    values = comparison.to_json()
    assert [(run["name"], run["role"]) for run in values["runs"]] == [
        ("small", "run"),
        ("moe", "run"),
        ("large", "baseline"),
    ]
    assert values["ratios"] == values["runs"][0]["ratios"]
    assert values["runs"][1]["ratios"]["tokens"]["run"] == "moe"
    assert values["runs"][2]["ratios"] == {}
