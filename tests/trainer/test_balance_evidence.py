"""What balancing is worth on the quickstart's corpus and model: load, and loss, over three fixed seeds."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)

# as in docs/balancing.md, whose table these runs are
METHODS = {
    "sign": ("balance.bias_update_speed=0.002", "balance.sequence_loss_alpha=0.01"),
    "quantile": ("balance.quantile_step=0.2", "balance.sequence_loss_alpha=0.01"),
    "aux_loss": ("balance.aux_loss_alpha=0.01", "balance.sequence_loss_alpha=0"),
    "none": ("balance.sequence_loss_alpha=0",),
}
BOUND = 0.5  # of the largest load over the mean, less 1

# evaluation and checkpoint at the end alone
WORDS = ("train.eval_every_tokens=10000000", "train.checkpoint_every_steps=1000")
QUARTER = ("train.max_steps=100",)  # time enough to collapse

Evaluation = dict[str, float]


def _last_evaluation(folder: Path, method: str, seed: int, *words: str) -> Evaluation:
    """Train the quickstart's recipe in `folder` on one thread, which repeats its sums, and give its last evaluation."""
    name = f"{method}_{seed}"
    command = [sys.executable, str(ROOT / "recipes" / "quickstart_moe.py"), f"run.name={name}", f"run.seed={seed}"]
    command += [f"balance.method={method}", *METHODS[method], *WORDS, *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/loss" in row][-1]


class Runs:
    """Whole trainings by method and seed, each made once, two at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[tuple[str, int], Evaluation] = {}

    def of(self, methods: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], Evaluation]:
        wanted = [(method, seed) for seed in seeds for method in methods]
        missing = [key for key in wanted if key not in self._done]
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda key: _last_evaluation(self.folder, *key), missing)
            self._done.update(zip(missing, found, strict=True))
        return {key: self._done[key] for key in wanted}

    def mean(self, method: str, metric: str) -> float:
        return statistics.fmean(self.of(list(METHODS), SEEDS)[method, seed][metric] for seed in SEEDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("balance"))


def test_a_quarter_of_a_run_balances_with_biases_and_collapses_without(tmp_path: Path) -> None:
    """Without balancing one expert is sent nearly every token; with the default rule none gets twice its share.

    The rule has moved biases by a hundred steps of 0.002 by then, and goes on to less than half of that.
    """
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda method: _last_evaluation(tmp_path, method, 0, *QUARTER), ("sign", "none"))
        sign, none = (row["eval/max_vio"] for row in found)
    assert sign < 2 * BOUND
    assert none > 3 * BOUND


@pytest.mark.soak
def test_biases_balance_unseen_text_whatever_the_seed(runs: Runs) -> None:
    """All three seeds, whole runs: no expert of any layer gets 1.5 times its share of the validation set.

    One run says no more: seed 0's last evaluation gave 0.24, 0.31 and 0.42 as rounding or Python's text changed.
    """
    for key, row in runs.of(("sign", "quantile"), SEEDS).items():
        assert row["eval/max_vio"] < BOUND, key


@pytest.mark.soak
@pytest.mark.parametrize("method", ["sign", "quantile"])
def test_nothing_does_not(runs: Runs, method: str) -> None:
    """Without balancing the mean violation is three times as large at the least."""
    assert runs.mean("none", "eval/max_vio") >= 3 * runs.mean(method, "eval/max_vio")


@pytest.mark.soak
@pytest.mark.parametrize("method", ["sign", "quantile"])
def test_balance_costs_no_loss(runs: Runs, method: str) -> None:
    """Over the seeds, validation loss is at most 0.01 nats above that of the auxiliary loss.

    Single seeds differ by 0.03 in either direction.
    """
    assert runs.mean(method, "eval/loss") <= runs.mean("aux_loss", "eval/loss") + 0.01
