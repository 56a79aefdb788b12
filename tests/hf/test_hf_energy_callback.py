"""The meter in a real transformers.Trainer, on a model of a few thousand parameters."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import moe.hf
from moe.energy import fold_ledgers, read_ledger

transformers = pytest.importorskip("transformers", reason="meters transformers' Trainer (extra `hf`)")


SCRIPT = Path(__file__).parent / "metered_trainer.py"
trainer = runpy.run_path(str(SCRIPT))["trainer"]


class Tracker(transformers.TrainerCallback):
    """What a tracker would see."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # torch, of a machine without an accelerator
def test_a_trainer_is_metered_and_resumed_in_the_same_ledger(tmp_path):
    """Steps, tokens and phases are marked; logs and trackers see kWh and device-hours; a resumed training goes on."""
    first, tracker = trainer(tmp_path, 6), Tracker()
    first.add_callback(tracker)
    moe.hf.EnergyCallback(declared_power_w=100, interval_s=0.01).add_to(first)
    first.train()
    fold = fold_ledgers([tmp_path / "ledger.jsonl"])
    assert (fold.segments[0].first_step, fold.segments[0].last_step, fold.segments[0].ended) == (0, 6, "end")
    assert fold.tokens == 6 * 4 * 8
    assert {"forward_backward", "optimizer", "evaluation", "checkpoint", "data"} <= fold.phases.keys()
    assert fold.total.source == "declared"
    for rows in (tracker.seen, first.state.log_history):
        hours = [row["train/device_hours"] for row in rows]
        assert hours == sorted(hours)
        assert 0 < rows[-1]["energy/total_kwh"] * 3.6e6 <= fold.total.energy_j + 1e-6

    again = trainer(tmp_path, 9)
    again.add_callback(moe.hf.EnergyCallback(declared_power_w=100, interval_s=0.01))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    fold = fold_ledgers([tmp_path / "ledger.jsonl"])
    assert [(part.first_step, part.last_step) for part in fold.segments] == [(0, 6), (3, 9)]
    assert fold.tokens == 9 * 4 * 8
    assert 0 < fold.total.useful_device_hours < fold.total.device_hours  # steps 4 to 6 were done twice
    assert again.state.log_history[-1]["train/device_hours"] > fold.segments[0].elapsed_s / 3600
    assert json.loads((tmp_path / "checkpoint-9/trainer_state.json").read_text())["log_history"]
    assert [record["kind"] for record in read_ledger(tmp_path / "ledger.jsonl")].count("end") == 2


def test_two_ranks_have_one_reader_and_one_ledger(tmp_path):
    """The first rank reads for both: its tokens are those of all ranks, and the host is one device, not two."""

    def launch(steps: int, *checkpoint: str) -> dict[int, tuple[bool, str]]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launcher, str(SCRIPT), str(tmp_path), str(steps), *checkpoint],
            capture_output=True, text=True, timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told = re.findall(r"rank (\d) read (\w+) hours (None|[\d.e-]+)", done.stdout)
        return {int(rank): (read == "True", hours) for rank, read, hours in told}

    ranks = launch(6)
    assert {rank: read for rank, (read, _) in ranks.items()} == {0: True, 1: False}
    (ledger,) = tmp_path.glob("ledger*.jsonl")
    fold = fold_ledgers([ledger])
    (segment,) = fold.segments
    assert (segment.last_step, segment.ended, fold.tokens) == (6, "end", 6 * 2 * 4 * 8)
    assert len(fold.devices) == 1
    assert fold.total.device_hours == pytest.approx(segment.elapsed_s / 3600)
    assert 0 < float(ranks[0][1]) <= fold.total.device_hours
    assert ranks[1][1] == "None"

    launch(9, str(tmp_path / "checkpoint-3"))
    fold = fold_ledgers([ledger])
    assert [(part.first_step, part.last_step) for part in fold.segments] == [(0, 6), (3, 9)]
    assert fold.tokens == 9 * 2 * 4 * 8
    assert list(tmp_path.glob("ledger*.jsonl")) == [ledger]
    assert not any("second_reader" in record for record in read_ledger(ledger))


def test_without_transformers_it_is_one_sentence():
    """Loading and saving need no transformers; the callback says what to install."""
    code = (
        "import sys; sys.modules['transformers'] = None; import moe.hf\n"
        "try: moe.hf.EnergyCallback\nexcept moe.errors.ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "EnergyCallback needs transformers: pip install 'frugal-moe[hf]'\n", done.stderr
