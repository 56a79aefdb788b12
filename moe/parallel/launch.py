"""Which engine the launch asked for, and whether that is what runs: a launch that got something else stops here.

accelerate tells its processes by environment variables what it was asked for, and then takes what the machine has:
without a GPU it starts several processes that each train alone, and with ACCELERATE_USE_CPU it forgets DeepSpeed, both
without a word.
"""

import importlib.util
import os

from moe.config import Recipe, TrainConfig
from moe.errors import ConfigError
from moe.parallel import ranks
from moe.parallel.engine import Engine
from moe.parallel.zero import ZeroEngine

__all__ = ["start_engine"]

# what an accelerate configuration may also ask of DeepSpeed -> the variable its processes are told by
_SETTINGS = {
    "deepspeed_config_file": "DEEPSPEED_CONFIG_FILE",
    "offload_optimizer_device": "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "gradient_clipping": "GRADIENT_CLIPPING",
    "gradient_accumulation_steps": "GRADIENT_ACCUMULATION_STEPS",
}


def start_engine(recipe: Recipe) -> Engine:
    """Join the processes of this launch, and give the engine it asked for.

    Raises ConfigError when what the launch asked for is not supported, contradicts the recipe, or is not what runs.
    """
    _check_precision(recipe.train)
    if _asked("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            "the launch asks for FSDP (ACCELERATE_USE_FSDP=true), which is not supported; to shard the model, launch "
            "with recipes/launch/zero3.yaml"
        )
    if not _asked("ACCELERATE_USE_DEEPSPEED"):
        engine = Engine(recipe.train)
        _check_together(engine)
        return engine
    _check_deepspeed_can_start()
    _check_settings()
    stage = _zero_stage()
    _check_recipe(recipe, stage)
    return ZeroEngine(recipe, stage=stage)


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_precision(train: TrainConfig) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    # "fp8" is never the recipe's: accelerate means another library's layers by it
    if asked == "fp8" or asked not in ("no", train.precision):
        train.fail(
            "precision", f"contradicts accelerate's --mixed_precision {asked}; drop that flag, train.precision decides"
        )


def _check_together(engine: Engine) -> None:
    """Without a GPU, `accelerate launch --multi_gpu` makes a process group that accelerate then does not use."""
    asked = max(int(os.environ.get("WORLD_SIZE", "1")), ranks.world_size())
    if asked != engine.accelerator.num_processes:
        raise ConfigError(
            f"the launch started {asked} processes but accelerate trains each of them alone: it saw no GPU; "
            "on a CPU machine set ACCELERATE_USE_CPU=true in front of accelerate launch --multi_gpu"
        )


def _check_deepspeed_can_start() -> None:
    if _asked("ACCELERATE_USE_CPU"):
        raise ConfigError(
            "the launch asks for DeepSpeed, but ACCELERATE_USE_CPU=true makes accelerate use DistributedDataParallel "
            "instead; on a CPU machine set DS_ACCELERATOR=cpu in its place"
        )
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "ACCELERATE_USE_DEEPSPEED=true asks for DeepSpeed, but this process was not started by a launcher; start "
            "it with accelerate launch --config_file recipes/launch/zero2.yaml"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "the launch asks for DeepSpeed, which is not installed: pip install 'frugal-moe[deepspeed]', or launch "
            "with recipes/launch/ddp.yaml"
        )


def _zero_stage() -> int:
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise ConfigError(
            f"zero_stage={stage} of the launch must be 1, 2 or 3; without ZeRO, launch with recipes/launch/ddp.yaml"
        )
    return int(stage)


def _check_settings() -> None:
    """The launch says which stage; all else DeepSpeed is told comes from the recipe."""
    for setting, variable in _SETTINGS.items():
        value = os.environ.get(f"ACCELERATE_{variable}", "none")
        if value.lower() not in ("none", "auto") and (setting, value) != ("gradient_accumulation_steps", "1"):
            raise ConfigError(
                f"the launch sets {setting}={value}, which is not taken from there: the recipe decides, and nothing is "
                "offloaded; drop that setting"
            )


def _check_recipe(recipe: Recipe, stage: int) -> None:
    """Fields that this stage cannot do."""
    train, optim = recipe.train, recipe.optim
    if train.compile:
        train.fail("compile", "does not work under DeepSpeed; use false, or launch with recipes/launch/ddp.yaml")
    if train.recompute_layers and stage == 3:
        train.fail("recompute_layers", "does not work under ZeRO-3; use 0, or launch with recipes/launch/zero2.yaml")
    if optim.name == "muon":
        optim.fail("name", "needs whole matrices and ZeRO cuts them up; use adamw, or recipes/launch/ddp.yaml")
