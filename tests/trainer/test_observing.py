"""What a run tells of itself: where a step's time goes, a profile, memory, costs, and hooks of the recipe's own."""

import gzip
import json
import math
from typing import Any

import pytest
import torch

from moe.accounting.peaks import peak_flops
from moe.config import ModelConfig, parse_overrides
from moe.energy import fold_ledgers
from moe.energy.phases import STEP_PHASES
from moe.model import Transformer
from moe.rundir import RunDir
from moe.runs import read_components
from moe.trainer import train
from moe.trainer.breakdown import Breakdown

from .tiny_recipe import RECIPE

Place = Any  # the fixture's class; conftest is not importable by name
COMPONENTS = {"data", "attention", "router", "experts", "feed_forward", "head", "optimizer", "communication", "other"}


@pytest.fixture(scope="module")
def observed(place: Place) -> Place:
    """A run every step of which is split, with a profile, prices and hooks."""
    words = ("run.name=observed", "train.max_steps=20", "train.breakdown_every_steps=1", "train.profile_at_step=4",
             "energy.price_per_device_hour=2", "energy.price_per_kwh=0.5")  # fmt: skip
    done = place.python(*words, recipe="hooked_recipe.py", environment={"SMOOTH": "1"})
    assert done.returncode == 0, done.stderr
    return place


def test_a_step_is_split_into_components(observed: Place) -> None:
    """Every component has a time, together they are the step, and what lies between steps is idle."""
    rows = [row for row in observed.rows("observed") if "train/loss" in row]
    for row in rows:
        parts = {key.rpartition("/")[2]: value for key, value in row.items() if key.startswith("efficiency/step_s/")}
        assert parts.keys() == COMPONENTS | {"idle"}
        assert min(parts.values()) >= 0
        inside = sum(parts.values()) - parts["idle"]
        assert inside <= row["efficiency/step_s"]
    later = rows[8:]
    share = sum(sum(row[f"efficiency/step_s/{name}"] for name in COMPONENTS) for row in later) / sum(
        row["efficiency/step_s"] for row in later
    )
    assert share > 0.9
    for name in COMPONENTS - {"communication"}:
        assert max(row[f"efficiency/step_s/{name}"] for row in rows) > 0


def test_the_energy_of_steps_is_told_by_component(observed: Place) -> None:
    """Of a real run: every component, and what lies between steps, has joules; their sum is the steps' own."""
    run = RunDir(observed.run("observed"))
    fold = fold_ledgers(run.ledgers())
    components = read_components(run, fold)
    assert components is not None
    assert components.energy_mj.keys() == COMPONENTS | {"idle"}
    steps_mj = sum(phase.energy_mj for name, phase in fold.phases.items() if name in STEP_PHASES)
    assert sum(components.energy_mj.values()) == steps_mj > 0


def test_looking_changes_nothing(place: Place) -> None:
    """Splitting every step, tracing some, or none of it: bitwise the same losses."""
    words = ("train.max_steps=12", "train.log_every_steps=3")
    seen = place.python("run.name=seen", *words, "train.breakdown_every_steps=1", "train.profile_at_step=2")
    unseen = place.python("run.name=unseen", *words, "train.breakdown_every_steps=1000")
    assert seen.returncode == unseen.returncode == 0, seen.stderr + unseen.stderr
    assert place.losses("seen") == place.losses("unseen")
    assert not any(key.startswith("efficiency/step_s/data") for row in place.rows("unseen") for key in row)


def test_recomputed_layers_are_split_too(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is computed again counts to its component: all of them are still the step, and losses the same bits."""
    monkeypatch.chdir(place.folder)
    for name, layers, every in (("kept", 0, 1000), ("again", 2, 1000), ("again_split", 2, 1)):
        words = (f"run.name={name}", f"train.recompute_layers={layers}", f"train.breakdown_every_steps={every}")
        train(parse_overrides(RECIPE, [*words, "train.max_steps=12", "train.log_every_steps=1"]))
    assert place.losses("kept") == place.losses("again") == place.losses("again_split")
    rows = [row for row in place.rows("again_split") if "train/loss" in row][4:]
    for row in rows:
        parts = [row[f"efficiency/step_s/{name}"] for name in COMPONENTS]
        assert min(parts) >= 0
        assert sum(parts) <= row["efficiency/step_s"]
    inside = sum(row[f"efficiency/step_s/{name}"] for row in rows for name in COMPONENTS)
    assert inside > 0.9 * sum(row["efficiency/step_s"] for row in rows)


def test_time_goes_to_the_component_that_spends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only experts and attention move, in the forward and in the backward pass, all is theirs."""
    clock = [0.0]
    monkeypatch.setattr("moe.trainer.breakdown.time.perf_counter", lambda: clock[0])
    config = ModelConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1,
    )  # fmt: skip
    model = Transformer(config)

    def spend(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            clock[0] += seconds

        return hook

    breakdown = Breakdown(model, torch.device("cpu"), ranks=1, inside=True)
    ids = torch.randint(0, 40, (2, 8))
    with breakdown.measured(True):
        breakdown.switch("other")
        # registered after the stamps', so inside the component's time
        model.layers[1].mlp.experts.register_forward_pre_hook(spend(1.0))
        model.layers[0].self_attn.register_forward_pre_hook(spend(10.0))
        model.layers[1].mlp.experts.down_proj.register_hook(spend(100.0))
        model.layers[1].self_attn.o_proj.weight.register_hook(spend(1000.0))
        model.layers[1].mlp.router.weight.register_hook(spend(10000.0))
        model(ids, labels=ids).loss.backward()
    seconds = breakdown.seconds()
    assert seconds["experts"] == 101
    assert seconds["attention"] == 1010
    assert seconds["router"] == 10000
    assert math.isclose(sum(seconds.values()), 11111)
    assert breakdown.seconds() == {}
    with breakdown.measured(False):
        breakdown.switch("data")
    assert breakdown.seconds() == {}


def test_a_profile_is_left_in_the_run(observed: Place) -> None:
    """Three steps, as a trace other tools read and as a table."""
    folder = RunDir(observed.run("observed")).profile
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000004.rank0.json.gz",
        "step_00000004.rank0.txt",
    ]
    events = json.loads(gzip.decompress((folder / "step_00000004.rank0.json.gz").read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 4", "step 5", "step 6"} <= names
    assert "step 7" not in names
    assert "aten::mm" in (folder / "step_00000004.rank0.txt").read_text()


def test_memory_is_reported(observed: Place) -> None:
    """What was expected is said at the start; beside it the run holds what was measured."""
    run = RunDir(observed.run("observed"))
    report = run.read_json(run.memory)
    assert report["expected_bytes"].keys() == {"weights", "gradients", "optimizer", "activations"}
    assert report["peak_bytes"] > sum(report["expected_bytes"].values())  # the process holds more than tensors
    rows = [row for row in observed.rows("observed") if "train/loss" in row]
    assert report["peak_bytes"] >= rows[-1]["efficiency/peak_memory_bytes"]


def test_hooks_change_the_objective_and_add_to_evaluations(observed: Place) -> None:
    """A number of the objective's own is logged beside the loss; an evaluation has a further one."""
    rows = observed.rows("observed")
    assert all(row["train/penalty"] > 0 for row in rows if "train/loss" in row)
    assert all(row["eval/head_norm"] > 0 for row in rows if "eval/loss" in row)
    environment = json.loads((observed.run("observed") / "environment.json").read_text())
    assert environment["hooks"].endswith("Misbehaving")


def test_money_is_counted_and_is_a_budget(observed: Place) -> None:
    """efficiency/cost follows from the prices; train.max_cost stops with a checkpoint, and is refused without any."""
    last = [row for row in observed.rows("observed") if "train/loss" in row][-1]
    cost = 2 * last["train/device_hours"] + 0.5 * last["energy/total_kwh"]
    assert math.isclose(last["efficiency/cost"], cost, rel_tol=1e-12)
    done = observed.python("run.name=poor", "train.max_cost=1e-9", "energy.price_per_device_hour=2")
    assert done.returncode == 0, done.stderr
    assert "runs/poor stopped at step 1 because its budget is spent" in done.stderr
    assert [path.name for path in (observed.run("poor") / "checkpoints").iterdir()] == ["step_00000001"]
    refused = observed.python("run.name=free", "train.max_cost=5")
    assert refused.returncode == 2
    assert "error: train.max_cost=5.0 needs energy.price_per_device_hour or energy.price_per_kwh" in refused.stderr


def test_too_little_memory_is_one_sentence(place: Place) -> None:
    """A real allocation fails in step 3: the budget by part, the fields to change, no traceback, whole checkpoints."""
    words = ("run.name=starved", "train.checkpoint_every_steps=2")
    done = place.python(*words, recipe="hooked_recipe.py", environment={"STARVE": "3"})
    assert done.returncode == 2, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory at step 3, with " in sentence
    for word in ("weights", "gradients", "optimizer", "activations", "train.micro_batch_size (now 4",
                 "train.recompute_layers (now 0 of 2)", "train.seq_len (now 32)"):  # fmt: skip
        assert word in sentence
    assert "Traceback" not in done.stderr
    assert [path.name for path in (place.run("starved") / "checkpoints").iterdir()] == ["step_00000002"]
    again = place.python(*words)
    assert again.returncode == 0, again.stderr


def test_peaks_are_known_by_the_drivers_names() -> None:
    """The H100's siblings are told apart; a device nobody listed has no MFU rather than a guess."""
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H200 NVL", "bf16") == 835e12
    assert peak_flops("NVIDIA H200", "fp8") == 989.4e12  # only the routed experts' products are in 8 bits
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 66.9e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362.05e12
    assert peak_flops("NVIDIA L4", "bf16") == 121e12
    assert peak_flops("Some Other Device", "bf16") is None
