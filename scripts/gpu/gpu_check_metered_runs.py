"""A metered mixture of experts and its dense twin, each for about a minute, and what the ledger says they cost.

Both are the quickstart recipes with a larger model, launched as a user launches them. They stop by
`train.max_device_hours`, so that they take the same time on any GPU.
"""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check_nvml import Nvml
from gpu_check_part import ROOT, Part, main, write_json

SIZE = {  # 343 million parameters, 97 million active: a step fills the device, a checkpoint is 4 GB
    "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "kv_lora_rank": 256,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "intermediate_size": 2560,
    "n_routed_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
}  # fmt: skip
WORDS = (
    "train.precision=bf16", "train.seq_len=1024", "train.global_batch_size=32", "train.micro_batch_size=16",
    "train.max_steps=100_000", "train.log_every_steps=5", "train.eval_every_tokens=500_000",
    "train.eval_sequences=64", "train.checkpoint_every_steps=100_000", "optim.lr=6e-4", "optim.warmup_steps=50",
)  # fmt: skip
DRY_SIZE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "n_routed_experts": 4,
}
DRY_WORDS = (
    "data.source=LICENSE", "train.max_steps=4", "train.seq_len=32", "train.global_batch_size=2",
    "train.eval_every_tokens=128", "train.eval_sequences=2", "optim.warmup_steps=2",
)  # fmt: skip
RUNS = {"gpu_check_moe": "quickstart_moe", "gpu_check_dense": "quickstart_dense"}
AROUND_S = 27.0  # of a run beside its training time: launch, last evaluation, 4 GB of checkpoint put on the disk
TRAINING_S = 60.0
KEPT = ("config.json", "environment.json", "data.json", "metrics.jsonl", "ledger.jsonl")


def run(part: Part) -> None:
    """Both runs, each one's totals, and the two compared at equal loss."""
    each_s = (part.seconds_left - 12) / len(RUNS)
    training_s = min(TRAINING_S, each_s - AROUND_S)
    part.put("seconds_planned", {"training": round(training_s, 1), "killed_after": round(each_s, 1)})
    runs = part.work / "runs"
    sizes = models(part.dry)
    for name, recipe in RUNS.items():
        with part.section(name):
            words = [f"run.name={name}", f"run.directory={runs}", *sizes[name]]
            words += DRY_WORDS if part.dry else (*WORDS, f"train.max_device_hours={training_s / 3600:.6f}")
            train(part, name, recipe, words, each_s)
        with part.section(f"{name} totals"):
            part.put(name, {**part.data.get(name, {}), **totals(runs / name)})
            say_totals(part, name)
        keep_small_files(part, runs / name)
        shutil.rmtree(runs / name / "checkpoints", ignore_errors=True)  # gigabytes
    with part.section("comparison"):
        compare_at_equal_loss(part, *(runs / name for name in RUNS))


def models(dry: bool) -> dict[str, list[str]]:
    """Command-line words for the larger model and for its dense twin, which the recipes alone do not know."""
    sys.path.insert(0, str(ROOT / "recipes"))
    from quickstart_dense import RECIPE as DENSE
    from quickstart_moe import RECIPE as MOE

    large = MOE.model.replace(**(DRY_SIZE if dry else SIZE))
    words = {}
    pairs = {"gpu_check_moe": (MOE.model, large), "gpu_check_dense": (DENSE.model, large.dense_twin(match="active"))}
    for name, (base, wanted) in pairs.items():
        before, after = base.to_dict(), wanted.to_dict()
        words[name] = [f"model.{field}={value}" for field, value in after.items() if before[field] != value]
    return words


def train(part: Part, name: str, recipe: str, words: list[str], limit_s: float) -> None:
    """Launch one recipe; the energy counter is read before and after, as a check on the ledger from outside."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "scripts/one_process.yaml",
        "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        f"recipes/{recipe}.py", *words,
    ]  # fmt: skip
    before_mj, start = counter_mj(part), time.monotonic()
    status = part.child(command, f"{name}.log", limit_s)
    elapsed_s, after_mj = time.monotonic() - start, counter_mj(part)
    around_j = None if before_mj is None or after_mj is None else (after_mj - before_mj) / 1000
    found = {"command": command[1:], "exit_status": status, "process_s": round(elapsed_s, 2)}
    part.put(name, {**found, "counter_around_the_process_j": around_j})
    if status != 0:
        what = f"did not end within {limit_s:.0f} s" if status is None else f"exit status {status}"
        raise RuntimeError(f"{name} {what}: {part.tail(f'{name}.log', 400)}")


def counter_mj(part: Part) -> int | None:
    """The counter of the GPU a launch would use: the first visible one."""
    import torch

    try:
        return Nvml(None if part.dry else str(torch.cuda.get_device_properties(0).uuid)).counter_mj()
    except Exception as error:  # a missing check is no failure of the run
        part.note(f"the counter could not be read around the run: {error}")
        return None


def totals(run: Path) -> dict[str, Any]:
    """What ledger and metrics say: totals, devices, phases, speed, and how much of the device's arithmetic was used."""
    from moe.accounting import flops_per_token, num_parameters
    from moe.config import Recipe
    from moe.energy import fold_ledgers
    from moe.rundir import RunDir, read_metrics

    place = RunDir.existing(run)
    recipe = Recipe.from_dict(json.loads(place.config.read_text()))
    fold = fold_ledgers(place.ledgers())
    rows = list(read_metrics(place.metrics))
    rates = [row["efficiency/tokens_per_s"] for row in rows if row.get("efficiency/tokens_per_s")]
    rate = statistics.median(rates[len(rates) // 2 :]) if rates else None
    flops = flops_per_token(recipe.model, recipe.train.seq_len)
    losses = [{"tokens": row["train/tokens"], "loss": row["eval/loss"]} for row in rows if "eval/loss" in row]
    tokens = max((row.get("train/tokens", 0) for row in rows), default=0)
    energy_j = fold.total.energy_j
    return {
        "ledger": fold.to_json(),
        "ledger_notes": fold.notes,
        "parameters_total": num_parameters(recipe.model),
        "parameters_active": num_parameters(recipe.model, active=True),
        "tokens": tokens,
        "joules_per_token": energy_j / tokens if energy_j and tokens else None,
        "tokens_per_s": rate,
        "tflop_per_s": None if rate is None else rate * flops / 1e12,
        "evaluations": losses,
        "last_row": rows[-1] if rows else None,
    }


def say_totals(part: Part, name: str) -> None:
    """One phrase for the table."""
    found = part.data[name]
    total = found["ledger"]["total"]
    rate, flops = found["tokens_per_s"] or 0, found["tflop_per_s"] or 0
    energy = f"{total['energy_j'] or 0:.0f} +- {total['band_j']:.0f} J"
    origin = f"{total['source']}, {total['scope']}, coverage {total['coverage']:.3f}"
    part.say(f"{name.removeprefix('gpu_check_')} {energy} ({origin}), {rate:.0f} tokens/s, {flops:.1f} TFLOP/s")


def compare_at_equal_loss(part: Part, moe: Path, dense: Path) -> None:
    """The comparison as `moe compare --json` prints it; charts and tables need libraries this does not."""
    try:
        from moe.compare import compare
    except ImportError as error:
        part.note(f"no comparison at equal loss, only totals: {error}")
        return
    comparison = compare([moe], [dense]).to_json()
    write_json(part.keep / "compare.json", comparison)
    part.put("comparison", comparison)
    for axis, ratio in comparison["ratios"].items():
        part.say(f"{axis} ratio {ratio.get('value') or float('nan'):.2f} at loss {comparison['at_loss']:.3f}")


def keep_small_files(part: Part, run: Path) -> None:
    """Into the packed logs: everything another comparison needs, no weights."""
    for name in KEPT:
        if (run / name).is_file():
            (part.keep / run.name).mkdir(exist_ok=True)
            shutil.copyfile(run / name, part.keep / run.name / name)


if __name__ == "__main__":
    main(run)
