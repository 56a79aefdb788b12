"""`moe compare` as typed: what it prints, how it ends, how fast it starts."""

import json
import subprocess
import sys

import pytest

from moe.cli import main


@pytest.fixture
def moe(monkeypatch, capsys):
    """Runs `moe compare WORDS…` in this process; returns exit code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["moe", "compare", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


@pytest.fixture
def runs(make_run, steps):
    """An MoE and a ladder of two dense runs."""
    return (
        make_run("moe", steps(4, 3, 2)),
        make_run("dense_s", steps(5, 4, 3)),
        make_run("dense_m", steps(4.5, 3.5, 2.5)),
    )


def test_table_and_verdict(moe, runs):
    code, out, err = moe(runs[0], "--baseline", runs[1], "--at-loss", "3.5")
    assert (code, err) == (0, "")
    assert "Cost to reach 3.5 nats per token" in out
    assert "1.67" in out
    assert "1.00-3.00" in out
    assert "moe reached 3.5 nats per token with 0.60x the tokens of dense_s" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_all_that_stdout_holds(moe, runs, tmp_path):
    code, out, err = moe(runs[0], "--baseline", runs[1], "--json", "--html", tmp_path / "page.html")
    assert (code, err) == (0, "")
    assert set(json.loads(out)["ratios"]) == {"tokens", "device_hours", "energy"}
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "words",
    [
        ["moe", "--baseline", "dense_s", "dense_m", "--json"],
        ["moe", "--baseline", "dense_s", "--json", "--baseline", "dense_m"],
        ["--json", "--baseline", "dense_s", "dense_m", "--", "moe"],
        ["--baseline=dense_s", "moe", "--baseline=dense_m", "--json"],
    ],
)
def test_one_baseline_option_takes_several_runs(moe, runs, monkeypatch, words):
    monkeypatch.chdir(runs[0].parent)
    code, out, _ = moe(*words)
    assert code == 0
    roles = [(run["name"], run["role"]) for run in json.loads(out)["runs"]]
    assert roles == [("moe", "run"), ("dense_s", "baseline"), ("dense_m", "baseline")]


def test_without_a_baseline_there_are_curves_but_no_ratio_and_it_says_so(moe, runs):
    code, out, _ = moe(runs[0])
    assert code == 0
    assert "No baseline was given, so there are no ratios; name one with --baseline RUN." in " ".join(out.split())
    assert "baseline /" not in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "moe: nowhere is not a directory; give a run directory such as runs/NAME"),
        (["moe", "--baseline", "moe"], "moe: moe is given twice; give each run once, as RUN or as --baseline"),
        (["moe", "--at-loss", "nan"], "moe: --at-loss nan must be a finite number"),
        (["moe", "--html", "."], "moe: --html . is a folder; give the file to write, such as report.html"),
        (["moe", "--html", "none/a.html"], "moe: --html none/a.html cannot be written (No such file or directory)"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(moe, runs, monkeypatch, words, sentence):
    monkeypatch.chdir(runs[0].parent)
    code, out, err = moe(*words)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert err.count("\n") == 1


def test_altered_ledger_is_one_sentence(moe, runs):
    ledger = runs[0] / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"energy_mj":0', '"energy_mj":1'))
    code, _, err = moe(runs[0])
    assert code == 2
    assert "was altered" in err
    assert err.count("\n") == 1


def test_help_imports_neither_torch_nor_plotly():
    program = (
        "import sys; from moe.cli import main; sys.argv = ['moe', 'compare', '--help']\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'plotly', 'numpy', 'moe.energy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--at-loss" in out
    assert out.splitlines()[-1] == "[]"
