"""`moe branch` on a real trunk: what the branch shares, what it learns, what it costs, and what is refused."""

import hashlib
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from moe.branch import branch
from moe.config import Recipe, parse_overrides
from moe.energy import fold_ledgers, read_ledger
from moe.errors import ConfigError, MoEError
from moe.rundir import RunDir, read_metrics
from moe.schedule import learning_rate
from moe.trainer import train
from moe.trainer.__main__ import recipe_of
from moe.trainer.loop import Outcome

ROOT = Path(__file__).resolve().parents[2]
TRUNK = ("run.name=trunk", "optim.schedule=wsd", "train.checkpoint_every_steps=5", "train.keep_checkpoints=9")
AT, DECAY = 15, 4


def _python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )


def _state(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk of 20 steps in two segments, and its branch at step 15, trained as `moe branch` says."""
    folder = tmp_path_factory.mktemp("place")
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
    (folder / "text").write_text(" ".join(chance.choices(words, k=9000)), encoding="utf-8")
    tiny = runpy.run_path(str(ROOT / "tests/trainer/tiny_recipe.py"))["RECIPE"]
    places = (f"run.directory={folder / 'runs'}", f"data.source={folder / 'text'}")
    for steps in (10, 20):
        assert train(parse_overrides(tiny, [*TRUNK, *places, f"train.max_steps={steps}"])).step == steps
    before = _state(folder / "runs/trunk")
    made = _python(folder, "-m", "moe.cli", "branch", "runs/trunk", "--at", str(AT), "--decay", str(DECAY))
    assert made.returncode == 0, made.stderr
    assert made.stdout == "accelerate launch -m moe.trainer runs/trunk-at-15\n"
    launch = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no")
    done = _python(folder, *launch, *made.stdout.split()[2:], "tracking.trackers=none")
    assert done.returncode == 0, done.stderr
    assert _state(folder / "runs/trunk") == before
    return folder


def test_the_branch_has_the_tokens_of_its_trunk(place: Path) -> None:
    """The same files, and its training made none anew: what they are of is checked, as at every start."""
    trunk, mine = (
        {path.relative_to(run / "tokens"): path.stat().st_ino for path in (run / "tokens").rglob("*") if path.is_file()}
        for run in (place / "runs/trunk", place / "runs/trunk-at-15")
    )
    assert len(trunk) >= 4
    assert mine == trunk


def _rows(run: Path) -> dict[int, dict[str, Any]]:
    return {row["train/step"]: row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row}


def test_the_branch_learns_as_the_trunk_until_its_rate_falls(place: Path) -> None:
    """Shared rows are the trunk's; the next two losses too, bit for bit; then the rates are those of the decay."""
    trunk, mine = _rows(place / "runs/trunk"), _rows(place / "runs/trunk-at-15")
    assert list(mine) == list(range(1, AT + DECAY + 1))
    assert all(mine[step] == trunk[step] for step in range(1, AT + 1))
    recipe = Recipe.read(place / "runs/trunk-at-15/config.json")
    assert (recipe.run.name, recipe.optim.decay_steps, recipe.train.max_steps) == ("trunk-at-15", DECAY, AT + DECAY)
    for step, row in mine.items():
        assert row["train/lr"] == learning_rate(recipe.optim, step - 1, AT + DECAY)
    assert [mine[step]["train/lr"] / 3e-3 for step in (15, 16, 17)] == pytest.approx([1, 1, 0.55])
    same = [step for step in mine if mine[step]["train/loss"] == trunk[step]["train/loss"]]
    assert same == list(range(1, AT + 3))  # the rate first differs in step 17, so the loss in step 18


def test_the_branch_costs_what_its_whole_lineage_cost(place: Path) -> None:
    """Its ledger is the trunk's up to the checkpoint, byte for byte, then its own; branch.json says which is which."""
    trunk, run = RunDir(place / "runs/trunk"), RunDir(place / "runs/trunk-at-15")
    facts = run.read_json(run.branch)
    assert (facts["trunk"], facts["step"], facts["tokens"]) == ("trunk", AT, AT * 4 * 32)
    records = list(read_ledger(run.ledger()))
    cut = next(i for i, line in enumerate(records) if line["seq"] == facts["ledger"]["seq"])
    mark = next(line for line in reversed(records[: cut + 1]) if line["kind"] == "mark")
    assert (mark["segment"], mark["step"]) == (1, AT)
    assert records[cut + 1]["reason"] == "branched at step 15"
    shared = run.ledger().read_bytes().splitlines(keepends=True)[: cut + 1]
    assert trunk.ledger().read_bytes().startswith(b"".join(shared))

    fold, trunks = fold_ledgers(run.ledgers()), fold_ledgers(trunk.ledgers())
    assert [part.end_reason for part in fold.segments] == ["stopped", "branched at step 15", "stopped"]
    own = fold.segments[2]
    assert (own.first_step, own.last_step) == (AT, AT + DECAY)
    assert fold.total.unattributed_j == pytest.approx(0, abs=1e-9)
    assert fold.total.energy_j == pytest.approx(facts["shared"]["energy_j"] + own.energy_j, abs=1e-6)
    assert fold.total.device_hours == pytest.approx(facts["shared"]["device_hours"] + own.elapsed_s / 3600)
    last = next(line for line in reversed(records[: cut + 1]) if line["kind"] == "reading")
    assert trunks.at(1, last["boottime_ns"])[0] == pytest.approx(facts["shared"]["energy_j"], abs=1e-6)
    assert trunks.at(1, records[cut]["boottime_ns"])[1] == pytest.approx(facts["shared"]["device_hours"])


def test_everything_reads_the_branch(place: Path) -> None:
    """`moe energy report` and `moe compare` take it like any run."""
    report = _python(place, "-m", "moe.cli", "energy", "report", "runs/trunk-at-15", "--json")
    assert report.returncode == 0, report.stderr
    assert len(json.loads(report.stdout)["segments"]) == 3
    compared = _python(place, "-m", "moe.cli", "compare", "runs/trunk-at-15", "--baseline", "runs/trunk", "--json")
    assert compared.returncode == 0, compared.stderr
    assert {run["name"]: run["tokens"] for run in json.loads(compared.stdout)["runs"]} == {
        "trunk-at-15": (AT + DECAY) * 4 * 32, "trunk": 20 * 4 * 32,
    }  # fmt: skip


def test_the_directory_goes_on_as_what_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is complete; one that was moved and renamed is the run of its folder."""
    monkeypatch.chdir(place / "runs")
    assert train(recipe_of(["trunk-at-15"])) == Outcome(AT + DECAY, "complete")
    shutil.copytree("trunk-at-15", "elsewhere/moved")
    monkeypatch.chdir("elsewhere/moved")
    recipe = recipe_of(["."])
    assert (recipe.run.name, recipe.run.directory) == ("moved", "..")


def test_a_run_that_decays_keeps_its_length(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trunk could be made longer; the branch, whose last steps had falling rates, is refused in one sentence."""
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError) as caught:
        train(parse_overrides(recipe_of(["runs/trunk-at-15"]), ["train.max_steps=30"]))
    assert str(caught.value) == (
        "train.max_steps=30 differs from run 'trunk-at-15', which has 19, and would move a decay that begins at step "
        "15, before its step 19; go back to a checkpoint before that with train.resume=PATH, or branch from one with "
        "moe branch"
    )


@pytest.mark.parametrize(
    ("run", "step", "decay", "name", "sentence"),
    [
        ("nobody", 15, 4, None, "runs/nobody is not a directory; give a run directory such as runs/NAME"),
        ("trunk", 12, 4, "b", "runs/trunk has no checkpoint of step 12; there are 5, 10, 15, 20 (train.keep_"),
        ("trunk", 15, 4, None, "runs/trunk-at-15 exists; choose another name with --name NAME"),
        ("trunk", 15, 4, "../b", "run.name='../b' must be a plain folder name"),
        ("trunk", 15, 0, "b", "--decay 0 must be at least 1"),
        ("trunk", 3, 4, "b", "--at 3 lies within the warm-up of runs/trunk; branch at 5 or later"),
        ("trunk-at-15", 19, 4, "b", "--at 19: runs/trunk-at-15 has decayed since step 15; branch there or before"),
        ("cosine", 15, 4, "b", "runs/cosine has optim.schedule=cosine, which falls from the warm-up on; branch from"),
        ("empty", 15, 4, "b", "runs/empty/config.json does not describe a run (Recipe.__init__() missing"),
        ("torn", 15, 4, "b", "model.safetensors does not match its manifest"),
        ("forgetful", 15, 4, "b", "does not reach the checkpoint's line"),
        ("unmetered", 15, 4, "b", "ledger runs/unmetered/ledger.jsonl cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_branched_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, run: str, step: int, decay: int, name: str | None, sentence: str
) -> None:
    """One sentence each, and nothing is left behind."""
    monkeypatch.chdir(place)
    trunk = Path("runs", run)
    config = trunk / "config.json"
    if run in ("cosine", "empty", "torn", "forgetful", "unmetered"):
        shutil.copytree("runs/trunk", trunk, dirs_exist_ok=True)
    if run == "cosine":
        config.write_text(config.read_text().replace("wsd", "cosine"))
    if run == "empty":
        config.write_text("{}")
    if run == "torn":
        (trunk / "checkpoints/step_00000015/model.safetensors").write_bytes(b"")
    if run == "forgetful":
        lines = (trunk / "ledger.jsonl").read_bytes().splitlines(keepends=True)
        (trunk / "ledger.jsonl").write_bytes(b"".join(lines[:5]))
    if run == "unmetered":
        (trunk / "ledger.jsonl").unlink()
    there = sorted(Path("runs").iterdir())
    with pytest.raises(MoEError) as caught:
        branch(RunDir.existing(trunk), step, decay, name)
    assert sentence in str(caught.value)
    assert sorted(Path("runs").iterdir()) == there


def test_a_branch_can_be_branched_before_its_decay(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the step it left its trunk it is a trunk itself; what is shared is the same; so are batches passed over."""
    monkeypatch.chdir(place)
    skipped = [{"step": step, "batches": 1, "cause": "a spike"} for step in (3, AT, AT + 1)]
    Path("runs/trunk-at-15/skipped.json").write_text(json.dumps({"skipped": skipped}))
    made = branch(RunDir.existing("runs/trunk-at-15"), AT, 9, "longer")
    assert made.read_json(made.skipped) == {"skipped": skipped[:2]}
    facts, first = made.read_json(made.branch), json.loads(Path("runs/trunk-at-15/branch.json").read_text())
    assert facts == {**first, "trunk": "trunk-at-15"}
    assert Recipe.read(made.config).train.max_steps == AT + 9


def test_the_branch_keeps_a_saved_tokenizer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files, though the originals are gone: only tokenizer_config.json says which token ends a document."""
    monkeypatch.chdir(place)
    saved, trunk = Path("saved"), RunDir(Path("runs/given"))
    saved.mkdir()
    shutil.copy("runs/trunk/tokenizer.json", saved)
    tiny = runpy.run_path(str(ROOT / "tests/trainer/tiny_recipe.py"))["RECIPE"]
    words = ["run.name=given", "data.source=text", "data.tokenizer=saved", "data.end_token=e", "train.max_steps=5"]
    assert train(parse_overrides(tiny, [*TRUNK, *words])).step == 5
    shutil.rmtree(saved)
    made = branch(RunDir.existing(trunk.root), 5, 2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made.root / name).read_bytes() == (trunk.root / name).read_bytes()
    assert json.loads((made.root / "tokenizer_config.json").read_text())["eos_token"] == "e"
    assert train(recipe_of([str(made.root)])) == Outcome(7, "complete", metrics=ANY)


def test_the_trainer_says_what_is_wrong(place: Path) -> None:
    """No traceback: exit code 2 and the sentence."""
    failed = _python(place, "-m", "moe.trainer", "runs/none")
    assert failed.returncode == 2
    assert failed.stderr == "error: runs/none is not a directory; give a run directory such as runs/NAME\n"
    with pytest.raises(ConfigError, match=r"no run directory: accelerate launch -m moe\.trainer runs/NAME"):
        recipe_of(["train.max_steps=3"])


def test_a_ledger_ends_where_it_is_cut(tmp_path: Path) -> None:
    """Other nodes' ledgers are cut by the clock: a node that came later leaves no file, one that had ended no end."""
    from moe.energy.cut import cut_ledger
    from moe.energy.ledger import LedgerWriter

    writer = LedgerWriter(tmp_path / "whole")
    writer.append("segment", devices=[])
    writer.append("end", reason="stopped")
    writer.close()
    assert cut_ledger(tmp_path / "whole", tmp_path / "none", lambda line: False, "cut") is None
    assert not (tmp_path / "none").exists()
    cut_ledger(tmp_path / "whole", tmp_path / "all", lambda line: True, "cut")
    assert (tmp_path / "all").read_bytes() == (tmp_path / "whole").read_bytes()
    cut_ledger(tmp_path / "whole", tmp_path / "half", lambda line: line["kind"] == "segment", "cut")
    assert [line["kind"] for line in read_ledger(tmp_path / "half")] == ["segment", "end"]


def test_a_programme_counts_what_a_branch_shares_once(place: Path) -> None:
    """`moe energy total` of trunk and branch: the sum of the two less what branch.json says they share."""
    done = _python(place, "-m", "moe.cli", "energy", "total", "runs/trunk", "runs/trunk-at-15", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    trunk, run = RunDir(place / "runs/trunk"), RunDir(place / "runs/trunk-at-15")
    totals = [fold_ledgers(each.ledgers()).total for each in (trunk, run)]
    shared = run.read_json(run.branch)["shared"]
    half = said["measured" if totals[0].measured else "estimated"]
    assert half["energy_j"] == pytest.approx(
        sum(total.energy_j or 0 for total in totals) - shared["energy_j"], abs=1e-6
    )
    assert half["device_hours"] == pytest.approx(sum(total.device_hours for total in totals) - shared["device_hours"])
    assert said["recognised"][0].startswith("runs/trunk-at-15 is a branch of runs/trunk: ")
