"""What may be compared: nats or bits by the data, energy by source, scope and devices."""

import json
from itertools import pairwise

import pytest

from moe.compare import compare
from moe.errors import CompareError

LINE = "energy is time x declared power"


def test_another_tokenizer_moves_the_comparison_to_bits_per_byte(make_run, steps):
    moe = make_run("moe", steps(4, 3, 2), bits=0.5)
    dense = make_run("dense", steps(5, 4, 3), tokenizer="other", bits=0.25)
    comparison = compare([moe], [dense], at_loss=1.125)
    assert (comparison.unit, comparison.same_data) == ("bits per byte", False)
    assert "Losses are compared in bits per byte: the tokenizers differ." in comparison.notes
    crossings = [entry.crossing.costs["tokens"].value for entry in comparison.entries]
    assert crossings == [2.75 * 1280, 1.5 * 1280]
    assert comparison.to_json()["runs"][0]["eval_loss"] == 1.0


def test_standard_error_scales_with_the_unit(make_run, steps):
    """Losses 6 … 2 nats are 3 … 1 bits: an error of 1.25 nats is 0.625 bits, and shifts by as many evaluations."""
    moe = make_run("moe", [(tokens, loss, loss / 10) for tokens, loss, _ in steps(6, 5, 4, 3, 2)], bits=0.5)
    other = make_run("other", steps(6, 5, 4, 3, 2), tokenizer="other")
    nats = compare([moe], at_loss=3.5).entries[0].crossing.costs["tokens"]
    bits = compare([moe], [other], at_loss=1.75).entries[0].crossing.costs["tokens"]
    assert bits == nats
    assert nats.low < 3 * 1280


def test_other_validation_text_is_said_plainly(make_run, steps):
    comparison = compare([make_run("moe", steps(4))], [make_run("dense", steps(4), validation="other")])
    assert any("validation texts differ" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        pytest.param(
            {"train": {"eval_sequences": 50}},
            {"train": {"eval_sequences": 40}},
            "moe: 50 sequences of 256 tokens, dense: 40 sequences of 256 tokens",
            id="a part each, by the recipe",
        ),
        pytest.param(
            {"train": {"seq_len": 512}, "validation_tokens": 51_200},
            {"train": {"seq_len": 256}, "validation_tokens": 51_200},
            "moe: all sequences of 512 tokens, dense: all sequences of 256 tokens",
            id="all of it, in sequences of another length",
        ),
        pytest.param(
            {"validation_tokens": 25_600, "sequences": 100},
            {"validation_tokens": 25_600, "sequences": 64},
            "moe: all sequences of 256 tokens, dense: 64 sequences of 256 tokens",
            id="a part, by what its evaluations tell",
        ),
    ],
)
def test_evaluations_of_other_sequences_are_not_compared_in_nats(make_run, steps, one, other, told):
    """The same file of validation text is not the same evaluation: another mean over other tokens."""
    moe, dense = make_run("moe", steps(4, 3), **one), make_run("dense", steps(4, 3), **other)
    comparison = compare([moe], [dense])
    assert (comparison.unit, comparison.same_data) == ("bits per byte", False)
    assert "Losses are compared in bits per byte: the evaluated sequences differ." in comparison.notes
    assert f"The evaluated text differs, which no unit makes up for ({told})." in comparison.notes
    assert compare([moe]).unit == "nats per token"


def test_evaluations_of_other_sequences_without_bytes_are_refused(make_run, steps):
    dense = make_run("dense", steps(4), bits=None, train={"eval_sequences": 40})
    with pytest.raises(
        CompareError, match=r"differ in tokenizer or evaluated text, .* dense has an evaluation without"
    ):
        compare([make_run("moe", steps(4))], [dense])


def test_the_same_evaluation_told_in_other_words_is_the_same(make_run, steps):
    """All 100 sequences: by default, by asking for more than there are, and by the count of the evaluation itself."""
    runs = [
        make_run("default", steps(4), validation_tokens=25_700),
        make_run("more", steps(4), validation_tokens=25_700, train={"eval_sequences": 1000}),
        make_run("counted", steps(4), validation_tokens=25_700, train={"eval_sequences": 1000}, sequences=100),
    ]
    assert compare(runs).unit == "nats per token"
    parts = [
        make_run("asked", steps(4), validation_tokens=25_700, train={"eval_sequences": 64}),
        make_run("told", steps(4), validation_tokens=25_700, train={"eval_sequences": 64}, sequences=64),
    ]
    assert compare(parts).unit == "nats per token"


def test_as_many_sequences_of_another_tokenizer_are_other_text(make_run, steps):
    """All of a text is the same text for any tokenizer, 64 sequences of it are not."""
    whole = [make_run(f"all_{name}", steps(4), tokenizer=name, validation_tokens=25_700) for name in "ab"]
    assert not any("evaluated text differs" in note for note in compare(whole).notes)
    part = [make_run(name, steps(4), tokenizer=name, train={"eval_sequences": 64}) for name in "ab"]
    notes = compare(part).notes
    assert "Losses are compared in bits per byte: the tokenizers and the evaluated sequences differ." in notes
    assert any("The evaluated text differs" in note for note in notes)


def test_an_evaluation_that_changed_on_the_way_is_not_the_others(make_run, steps):
    moe, dense = (make_run(name, steps(4, 3), validation_tokens=25_600, sequences=100) for name in ("moe", "dense"))
    lines = (moe / "metrics.jsonl").read_text()
    (moe / "metrics.jsonl").write_text(lines.replace('"eval/sequences": 100.0', '"eval/sequences": 64.0', 1))
    told = "(moe: 64 or all sequences of 256 tokens, dense: all sequences of 256 tokens)"
    assert any(told in note for note in compare([moe], [dense]).notes)


def test_without_a_shared_unit_the_comparison_is_refused(make_run, steps):
    with pytest.raises(CompareError, match="dense has an evaluation without eval/bits_per_byte"):
        compare([make_run("moe", steps(4))], [make_run("dense", steps(4), tokenizer="other", bits=None)])


def test_hashes_that_were_not_recorded_prove_nothing(make_run, steps):
    paths = [make_run(name, steps(4)) for name in ("moe", "dense")]
    for path in paths:
        (path / "data.json").write_text("{}")
    comparison = compare(paths[:1], paths[1:])
    assert comparison.unit == "bits per byte"
    assert any("hashes of text and tokenizer were not recorded" in note for note in comparison.notes)


@pytest.mark.parametrize("source", ["estimate:tdp", "declared"])
def test_an_estimate_leaves_one_cost_axis_and_the_line(make_run, steps, source):
    moe = make_run("moe", steps(4, 3, 2), source=source)
    dense = make_run("dense", steps(5, 4, 3))
    for comparison in (compare([moe], [dense]), compare([dense], [moe])):
        values = comparison.to_json()
        assert values["cost_axes"] == ["tokens", "device_hours"]
        assert set(values["ratios"]) == {"tokens", "device_hours"}
        assert [run["at_loss"]["energy_j"] for run in values["runs"]] == [None, None]
        assert values["notes"].count(LINE) == 1
    assert values["runs"][1]["energy_source"] == source


def test_measured_runs_do_not_carry_the_line(make_run, steps):
    assert LINE not in compare([make_run("moe", steps(4))], [make_run("dense", steps(4))]).notes


def test_scopes_are_never_mixed(make_run, steps):
    comparison = compare([make_run("moe", steps(4))], [make_run("dense", steps(4), scope="node")])
    assert comparison.axes == ("tokens", "device_hours")
    assert any("it needs one scope" in note and "dense: node" in note for note in comparison.notes)


def test_sensor_gain_cancels_on_the_same_devices_and_widens_on_others(make_run, steps):
    moe = make_run("moe", steps(4, 3, 2), band=0.05)
    same = make_run("same", steps(5, 4, 3), band=0.05)
    other = make_run("other", steps(5, 4, 3), band=0.10, uuids=("GPU-9",))
    cancelled = compare([moe], [same], at_loss=3.5).ratios
    assert cancelled["energy"].span.low == pytest.approx(cancelled["tokens"].span.low)
    assert cancelled["energy"].span.high == pytest.approx(cancelled["tokens"].span.high)
    assert "the gain of the sensors cancels" in cancelled["energy"].method
    widened = compare([moe], [other], at_loss=3.5).ratios
    assert widened["energy"].span.value == pytest.approx(widened["tokens"].span.value)
    assert widened["energy"].span.low == pytest.approx(widened["tokens"].span.low * 0.90 / 1.05)
    assert widened["energy"].span.high == pytest.approx(widened["tokens"].span.high * 1.10 / 0.95)
    assert "Different devices measured the sides" in widened["energy"].method


def test_quantisation_stays_on_the_same_devices(make_run, steps):
    """Ticks of 0.1 s at up to 100 W leave 20 J at both ends of each run, whatever the gain."""
    moe, dense = make_run("moe", steps(4, 3, 2), tick_s=0.1), make_run("dense", steps(5, 4, 3), tick_s=0.1)
    span = compare([moe], [dense], at_loss=3.5).ratios["energy"].span
    assert span.low == pytest.approx((256_000 - 20) / (256_000 + 20))
    assert span.high == pytest.approx((384_000 + 20) / (128_000 - 20))


def test_unlike_hardware_and_lost_coverage_are_said(make_run, steps):
    moe = make_run("moe", steps(4), environment={"device_name": "H200"})
    dense = make_run("dense", steps(4), environment={"device_name": "A100"}, read_until=0.5)
    notes = compare([moe], [dense]).notes
    assert any("A device-hour is not the same thing" in note and "dense: 1 x A100" in note for note in notes)
    assert "The meter of dense covers 50% of its time; the rest is not counted." in notes


def test_missing_standard_errors_are_said(make_run, steps):
    notes = compare([make_run("moe", steps(4, error=None))]).notes
    assert any("without a recorded standard error counts as exact" in note for note in notes)


def test_json_is_strict_and_holds_the_contract(make_run, steps):
    comparison = compare([make_run("moe", steps(4, 3, 2))], [make_run("dense", steps(5, 4, 3, error=0.1))], at_loss=3.0)
    values = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert list(values) == ["at_loss", "unit", "same_data", "cost_axes", "runs", "ratios", "notes"]
    contract = {
        *("name", "role", "parameters_total", "parameters_active", "tokens", "device_hours", "energy_j"),
        *("energy_source", "energy_scope", "energy_band_j", "eval_loss", "at_loss"),
    }
    for run in values["runs"]:
        assert contract <= set(run)
        assert set(run["at_loss"]) == {"loss", "reached", "tokens", "device_hours", "energy_j"}
    for ratio in values["ratios"].values():
        assert set(ratio) == {"value", "low", "high", "n", "method", "run", "baseline"}
    assert [run["role"] for run in values["runs"]] == ["run", "baseline"]


def test_intervals_hold_their_value_on_noisy_curves(make_run):
    """Curves that go up and down, at every loss between them: low <= value <= high."""
    noisy = [(1280 * (i + 1), 5 - 0.4 * i + (0.7 if i % 3 == 1 else 0.0), 0.15) for i in range(9)]
    moe, dense = make_run("moe", noisy), make_run("dense", [(2 * tokens, loss, se) for tokens, loss, se in noisy])
    values = []
    for tenth in range(20, 50):
        span = compare([moe], [dense], at_loss=tenth / 10).ratios["tokens"].span
        assert span.low <= span.value <= (span.high or span.value)
        values.append(compare([moe], at_loss=tenth / 10).entries[0].crossing.costs["tokens"].value)
    assert all(later <= earlier for earlier, later in pairwise(values))
