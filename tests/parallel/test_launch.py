"""A launch whose engine is not what would run, or that contradicts the recipe, stops with one sentence."""

import sys
from typing import Any

import pytest

from moe.config import ModelConfig, OptimConfig, Recipe, RunConfig, TrainConfig
from moe.errors import ConfigError
from moe.parallel.launch import start_engine

# what accelerate launch tells a process of recipes/launch/zero2.yaml
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "LOCAL_RANK": "0"}


def recipe(**train: Any) -> Recipe:
    model = ModelConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, attention="gqa"
    )
    optim = OptimConfig(name=train.pop("optimizer", "adamw"))
    return Recipe(run=RunConfig(name="x"), model=model, train=TrainConfig(**train), optim=optim)


@pytest.mark.parametrize(
    ("told", "train", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP .* is not supported; .* recipes/launch/zero3.yaml"),
        (ZERO | {"ACCELERATE_USE_CPU": "true"}, {}, "uses? DistributedDataParallel instead; .* set DS_ACCELERATOR=cpu"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "not started by a launcher; start it with accelerate launch"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "zero_stage=0 of the launch must be 1, 2 or 3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "sets deepspeed_config_file=ds.json"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "sets offload_param_device=cpu"),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "sets gradient_clipping=0.5"),
        (ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "sets gradient_accumulation_steps=4"),
        (ZERO | {"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "train.precision='fp32' contradicts .* bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"precision": "fp8"}, "contradicts .* fp8; drop that flag"),
        (ZERO, {"compile": True}, "train.compile=True does not work under DeepSpeed"),
        (ZERO, {"optimizer": "muon"}, "optim.name='muon' needs whole matrices and ZeRO cuts them up"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {"recompute_layers": 1},
            "train.recompute_layers=1 does not work under ZeRO-3",
        ),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else None,
)
def test_what_would_not_run_is_refused(
    told: dict[str, str], train: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any process waits for another."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence) as caught:
        start_engine(recipe(**train))
    assert "\n" not in str(caught.value)


def test_deepspeed_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it."""
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'frugal-moe\[deepspeed\]'"):
        start_engine(recipe())


def test_deepspeed_that_became_ddp_is_refused(launches: Any) -> None:
    """On a CPU ACCELERATE_USE_CPU silently turns DeepSpeed into DDP; the sentence comes once and nothing is trained."""
    done, _ = launches.under("zero2", "trainer/tiny_recipe.py", "run.name=ddp_after_all", ACCELERATE_USE_CPU="true")
    assert done.returncode != 0
    assert done.stderr.count("the launch asks for DeepSpeed, but ACCELERATE_USE_CPU=true") == 1
    assert not launches.run("ddp_after_all").exists()
