"""Configuration: frozen dataclasses that check themselves, and the command-line words that set their fields."""

from moe.config.balance import BalanceConfig
from moe.config.data import DataConfig
from moe.config.energy import EnergyConfig
from moe.config.model import ModelConfig
from moe.config.optim import OptimConfig
from moe.config.parse import parse_overrides
from moe.config.recipe import Recipe
from moe.config.run import RunConfig
from moe.config.tracking import TrackingConfig
from moe.config.train import TrainConfig

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "EnergyConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "parse_overrides",
]
