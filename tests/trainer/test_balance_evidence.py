"""What balancing is worth on the quickstart's corpus and model: load, and loss, over three fixed seeds."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)

# as in docs/balancing.md, whose table these runs are
METHODS = {
    "sign": ("balance.bias_update_speed=0.002", "balance.sequence_loss_alpha=0.01"),
    "quantile": ("balance.quantile_step=0.2", "balance.sequence_loss_alpha=0.01"),
    "aux_loss": ("balance.aux_loss_alpha=0.01",),
    "none": (),
}
# evaluation and checkpoint at the end alone
FULL = ("train.eval_every_tokens=10000000", "train.checkpoint_every_steps=1000")
# a quarter of it: time to collapse without balancing, and to recover with it when a bias can move 1 in 100 steps
SHORT = (*FULL, "train.max_steps=100", "train.eval_sequences=96")
SHORT_SIGN = "balance.bias_update_speed=0.01"


def _last_evaluation(folder: Path, method: str, seed: int, *words: str) -> dict[str, float]:
    """Train the quickstart's recipe in `folder` and give its last evaluation."""
    name = f"{method}_{seed}"
    command = [sys.executable, str(ROOT / "recipes" / "quickstart_moe.py"), f"run.name={name}", f"run.seed={seed}"]
    command += [f"balance.method={method}", *METHODS[method], *words]  # of a field given twice the last counts
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/loss" in row][-1]


class Runs:
    """Whole trainings by method and seed, each made once, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[tuple[str, int], dict[str, float]] = {}

    def __call__(self, method: str, seed: int, metric: str) -> float:
        if (method, seed) not in self._done:
            self._done[method, seed] = _last_evaluation(self.folder, method, seed, *FULL)
        return self._done[method, seed][metric]

    def mean(self, method: str, metric: str) -> float:
        return statistics.fmean(self(method, seed, metric) for seed in SEEDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("balance"))


def test_a_quarter_of_a_run_collapses_or_is_balanced(tmp_path: Path) -> None:
    """100 steps, seed 0: one expert is sent every token without balancing, none has far more than its share with it.

    Untrained, the same sequences give 0.7, so below 0.6 lies nothing that was left alone, trained or not. Measured:
    none 4.32, sign 0.34, quantile 0.24.
    """
    violation = {
        method: _last_evaluation(tmp_path, method, 0, *SHORT, *words)["eval/max_vio"]
        for method, words in (("none", ()), ("sign", (SHORT_SIGN,)), ("quantile", ()))
    }
    assert violation["none"] > 3
    assert violation["sign"] < 0.6
    assert violation["quantile"] < 0.6


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", ["sign", "quantile"])
def test_biases_balance_unseen_text(runs: Runs, method: str, seed: int) -> None:
    """No expert of any layer gets 1.35 times its share of the validation set, whatever the seed."""
    assert runs(method, seed, "eval/max_vio") < 0.35


@pytest.mark.soak
def test_nothing_does_not(runs: Runs) -> None:
    """Without balancing the violation is three times as large at the least."""
    assert runs.mean("none", "eval/max_vio") >= 3 * max(
        runs.mean(method, "eval/max_vio") for method in ("sign", "quantile")
    )


@pytest.mark.soak
@pytest.mark.parametrize("method", ["sign", "quantile"])
def test_balance_costs_no_loss(runs: Runs, method: str) -> None:
    """Over the seeds, validation loss is at most 0.01 nats above that of the auxiliary loss.

    Single seeds differ by 0.03 in either direction. One thread, as in all runs here, repeats the documented sums.
    """
    assert runs.mean(method, "eval/loss") <= runs.mean("aux_loss", "eval/loss") + 0.01
