"""Configuration: frozen dataclasses that check themselves, and the command-line words that set their fields."""

from moe.config.balance import BalanceConfig
from moe.config.model import ModelConfig
from moe.config.parse import parse_overrides
from moe.config.train import DataConfig, EnergyConfig, OptimConfig, Recipe, RunConfig, TrackingConfig, TrainConfig

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
