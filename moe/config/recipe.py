"""A whole recipe: everything that decides what a run does, and the checks that need more than one section."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.config.balance import BalanceConfig
from moe.config.data import DataConfig
from moe.config.energy import EnergyConfig
from moe.config.fields import Section, nearest
from moe.config.model import ModelConfig
from moe.config.optim import OptimConfig
from moe.config.run import RunConfig
from moe.config.tracking import TrackingConfig
from moe.config.train import TrainConfig
from moe.errors import ConfigError

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. Command-line words `section.field=value` change its fields."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)

    def __post_init__(self) -> None:
        if self.train.seq_len > self.model.max_position_embeddings:
            self.train.fail(
                "seq_len",
                f"exceeds model.max_position_embeddings ({self.model.max_position_embeddings}); raise that too",
            )
        depths = self.model.num_nextn_predict_layers
        if self.train.seq_len < depths + 2:
            self.train.fail("seq_len", f"leaves {depths} predicted tokens no room: make it at least {depths + 2}")
        layers = self.model.num_hidden_layers + depths
        if self.train.recompute_layers > layers:
            self.train.fail("recompute_layers", f"exceeds the model's layers: at most {layers}")
        if self.train.max_cost is not None and self.energy.has_no_price:
            self.train.fail("max_cost", "needs energy.price_per_device_hour or energy.price_per_kwh above 0; set one")
        self.optim.check_length(self.train.max_steps)
        self.balance.check_contradictions()
        if self.model.is_moe:
            self._check_routers()

    def _check_routers(self) -> None:
        model = self.model
        if self.balance.moves_biases and not model.has_expert_bias:
            self.balance.fail(
                "method", "moves expert biases, which only model.topk_method=noaux_tc has; use that, or none"
            )
        choices = model.n_routed_experts + model.n_null_experts
        self.balance.check_router(model.n_group, model.num_experts_per_tok, choices)

    def sections(self) -> dict[str, Section]:
        """Section objects by the word before the dot."""
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {name: section.to_dict() for name, section in self.sections().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe a config.json describes. Raises ConfigError for unknown sections and fields."""
        types: dict[str, type[Section]] = {
            "run": RunConfig,
            "model": ModelConfig,
            "data": DataConfig,
            "train": TrainConfig,
            "optim": OptimConfig,
            "balance": BalanceConfig,
            "tracking": TrackingConfig,
            "energy": EnergyConfig,
        }
        for name in values:
            if name not in types:
                raise ConfigError(f"{name!r} is not a section{nearest(name, types)}")
        return cls(**{name: types[name].from_dict(section) for name, section in values.items()})  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in a run directory's config.json; a field that is newer than the run has its default.

        Raises ConfigError, with the path, for a file that cannot be read or describes no run.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); restore it from a copy") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} does not describe a run ({error}); restore it from a copy") from None
