"""Reading run directories: lineage, costs of lost work, names, and one sentence for whatever is missing."""

import json

import pytest

from moe.compare import compare, load_run
from moe.errors import CompareError


def test_lost_work_leaves_the_curve_but_stays_in_the_cost(make_run):
    """Killed at 3840 tokens, resumed at 1280: 2560 tokens are trained twice, at 128 tokens/s and 100 W."""
    first = [(1280, 4.0), (2560, 1.0), (3840, 0.5)]
    second = [(2560, 3.0), (3840, 2.0)]
    run = load_run(make_run("moe", parts=[(0, 3840, first), (1280, 3840, second)], rate=128))
    assert [(point.tokens, point.loss) for point in run.curve] == [(1280, 4.0), (2560, 3.0), (3840, 2.0)]
    seconds = [10, 30 + 10, 30 + 20]
    assert [point.device_hours for point in run.curve] == pytest.approx([second / 3600 for second in seconds])
    assert [point.energy_j for point in run.curve] == pytest.approx([100 * second for second in seconds])
    assert (run.tokens, run.tokens_processed) == (3840, 6400)
    assert run.device_hours == pytest.approx(50 / 3600)


def test_a_run_whose_ledger_was_begun_in_the_middle_is_refused(make_run):
    """Steps 0 to 20 in a ledger that was moved away; one that began from another run's checkpoint is whole."""
    whole = make_run("whole", parts=[(2560, 3840, [(3840, 2.0)])])
    assert "the ledger begins at step 20: what the run cost before is not counted" in load_run(whole).meter_notes
    moved = make_run("moved", [(1280, 4.0), (2560, 3.0)])
    with (moved / "metrics.jsonl").open("a") as file:
        file.writelines((whole / "metrics.jsonl").read_text().splitlines(keepends=True))
    (whole / "ledger.jsonl").rename(moved / "ledger.jsonl")
    with pytest.raises(CompareError, match="moved was trained before its ledger begins at step 20"):
        load_run(moved)


def test_a_torn_last_line_is_skipped(make_run, steps):
    path = make_run("moe", steps(4, 3))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"segment": 0, "train/st')
    assert len(load_run(path).curve) == 2


def test_devices_multiply_the_cost(make_run, steps):
    run = load_run(make_run("moe", steps(4, 3), rate=128, uuids=("GPU-0", "GPU-1")))
    assert run.device_hours == pytest.approx(2 * 20 / 3600)
    assert run.energy_j == pytest.approx(2 * 100 * 20)


@pytest.mark.parametrize(
    ("uuids", "ranks", "words"),
    [
        (["GPU-0"], 1, "1 x Test GPU"),
        (["GPU-0", "GPU-1"], 2, "2 x Test GPU"),
        (["host"], 2, "1 x Test GPU, 2 ranks"),
    ],
)
def test_hardware_counts_the_devices_that_are_paid_for(make_run, steps, uuids, ranks, words):
    """Two ranks on one host are one device, as in the device-hours; its kind is the same for any number of ranks."""
    run = make_run("moe", steps(4), uuids=uuids, environment={"world_size": ranks})
    assert load_run(run).hardware == words
    notes = compare([run], [make_run("dense", steps(4))]).notes
    assert not any("A device-hour is not the same thing" in note for note in notes)


def test_parameters_are_those_of_the_configuration(make_run, steps):
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    moe, dense = load_run(make_run("moe", steps(4), model=experts)), load_run(make_run("dense", steps(4)))
    assert dense.parameters_total - dense.parameters_active == 64 * 16  # the input embedding
    assert moe.parameters_total - moe.parameters_active == 64 * 16 + 2 * 3 * (3 * 16 * 8)


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run, steps):
    names = [entry.run.name for entry in compare([make_run("a/x", steps(4))], [make_run("b/x", steps(4))]).entries]
    assert names == ["a/x", "b/x"]


def test_control_characters_in_a_name_do_not_reach_the_terminal(make_run, steps):
    assert load_run(make_run("a\x1b[2Jb", steps(4))).name == "a�[2Jb"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ledger.jsonl", None, "moe has no ledger.jsonl"),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read"),
        ("data.json", None, "data.json is missing"),
        ("environment.json", "[]", "does not hold a JSON object"),
        ("config.json", "{}", "does not describe a run"),
        ("config.json", '{"run": 3}', "does not describe a run"),
        ("config.json", "{", "is not valid JSON"),
    ],
)
def test_a_missing_or_broken_file_is_one_sentence(make_run, steps, file, text, message):
    path = make_run("moe", steps(4))
    if text is None:
        (path / file).unlink()
    else:
        (path / file).write_text(text)
    with pytest.raises(CompareError, match=message) as caught:
        load_run(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "data.json", "environment.json", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_one_sentence(make_run, steps, file):
    path = make_run("moe", steps(4))
    (path / file).unlink()
    (path / file).mkdir()
    with pytest.raises(CompareError, match=file) as caught:
        load_run(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval/loss": float("nan")}, "step 10 is not finite; the run diverged"),
        ({"eval/loss_se": "wide"}, "step 10 is incomplete"),
        ({"boottime_ns": None}, "step 10 is incomplete"),
    ],
)
def test_an_evaluation_that_cannot_be_used_is_named(make_run, steps, change, message):
    path = make_run("moe", steps(4))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= change
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CompareError, match=message):
        load_run(path)


def test_a_run_without_evaluations_is_refused(make_run):
    with pytest.raises(CompareError, match="moe has no evaluation yet"):
        load_run(make_run("moe"))


def test_a_run_is_given_once(make_run, steps):
    path = make_run("moe", steps(4))
    with pytest.raises(CompareError, match="is given twice"):
        compare([path], [path.parent / "." / "moe"])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CompareError, match=r"holds no config\.json"):
        compare([tmp_path])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_the_loss_must_be_a_number(make_run, steps, loss):
    with pytest.raises(CompareError, match="must be a finite number"):
        compare([make_run("moe", steps(4))], at_loss=loss)


def test_there_must_be_a_run():
    with pytest.raises(CompareError, match="no run to compare"):
        compare([])


def test_flops_are_those_of_the_experts_really_chosen(make_run, steps):
    """A run with null experts logs what share of its choices was real; the mean over its rows counts."""
    nulls = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_null_experts": 4, "moe_intermediate_size": 8,
        "topk_method": "noaux_tc",
    }  # fmt: skip
    path = make_run("nulls", steps(4.0, 3.0), model=nulls)
    even = load_run(path)
    assert even.computed_share is None
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line, share in zip([line for line in lines if "train/loss" in line], (0.25, 0.5), strict=True):
        line["router/computed_share"] = share
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = load_run(path)
    assert measured.computed_share == 0.375
    config = measured.recipe.model
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    saved = 6 * config.num_hidden_layers * expert * 2 * (0.5 - 0.375)
    assert even.flops_per_token - measured.flops_per_token == pytest.approx(saved)
