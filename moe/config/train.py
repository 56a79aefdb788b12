"""Sections of a recipe beside the model, and the recipe itself: everything that decides what a run does."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from moe.config.balance import BalanceConfig
from moe.config.fields import Section, nearest, setting
from moe.config.model import ModelConfig
from moe.errors import ConfigError

__all__ = ["DataConfig", "EnergyConfig", "OptimConfig", "Recipe", "RunConfig", "TrackingConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Which run this is."""

    section_name: ClassVar[str] = "run"

    name: str = setting(doc="folder of the run below run.directory")
    directory: str = setting("runs", doc="folder that holds the runs")
    seed: int = setting(0, at_least=0, at_most=2**31 - 1, doc="seed of the initial weights and of the data order")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What text is trained on, and how it becomes tokens. The tokenizer has `model.vocab_size` tokens."""

    section_name: ClassVar[str] = "data"

    source: str = setting("stdlib", doc="stdlib: Python's own standard library; or a text file, or a folder of them")
    validation_fraction: float = setting(
        0.05, above=0, below=1, doc="share of the files kept for validation (stdlib keeps its own fixed list)"
    )
    mask_documents: bool = setting(
        False, doc="tokens attend to their own document alone; false as DeepSeek-V3, which packs without a mask"
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then a cosine to `min_lr_ratio`."""

    section_name: ClassVar[str] = "optim"

    lr: float = setting(3e-4, above=0, doc="peak learning rate")
    min_lr_ratio: float = setting(0.1, at_least=0, at_most=1, doc="final learning rate as a share of the peak")
    warmup_steps: int = setting(100, at_least=0, doc="steps of linear warm-up")
    beta1: float = setting(0.9, at_least=0, below=1, doc="decay of AdamW's first moment")
    beta2: float = setting(0.95, at_least=0, below=1, doc="decay of AdamW's second moment")
    eps: float = setting(1e-8, above=0, doc="AdamW's epsilon")
    weight_decay: float = setting(0.1, at_least=0, doc="decay of matrices; norms, embeddings and routers have none")
    grad_clip: float = setting(1.0, above=0, doc="largest norm of the gradient")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The loop: how long, in what batches and precision, how often to look and to save."""

    section_name: ClassVar[str] = "train"

    max_steps: int = setting(1000, at_least=1, doc="optimizer steps of the whole run")
    global_batch_size: int = setting(8, at_least=1, doc="sequences an optimizer step, over all ranks")
    micro_batch_size: int | None = setting(
        None, at_least=1, doc="sequences a rank passes at once; none for global_batch_size / ranks"
    )
    seq_len: int = setting(256, at_least=2, doc="tokens a sequence")
    precision: Literal["fp32", "bf16"] = setting("fp32", doc="dtype of matrix products; master weights stay fp32")
    compile: bool = setting(False, doc="torch.compile the model")
    recompute_layers: int = setting(
        0, at_least=0, doc="layers, from the first, whose activations are computed again instead of kept"
    )
    mtp_loss_weight: float = setting(
        0.3,
        at_least=0,
        doc="weight of multi-token prediction's loss, for the whole run; DeepSeek-V3 used 0.3, then 0.1",
    )
    resume: str = setting("auto", doc="auto: go on from the newest whole checkpoint; never: a new run; or a checkpoint")
    eval_every_tokens: int = setting(100_000, at_least=1, doc="tokens between evaluations; one is made at the end too")
    eval_sequences: int | None = setting(None, at_least=1, doc="validation sequences an evaluation; none for all")
    checkpoint_every_steps: int = setting(200, at_least=1, doc="steps between checkpoints; one is made at the end too")
    keep_checkpoints: int = setting(2, at_least=1, doc="newest checkpoints kept")
    log_every_steps: int = setting(1, at_least=1, doc="steps between lines in metrics.jsonl")
    max_kwh: float | None = setting(None, above=0, doc="stop with a checkpoint when the run has used this much")
    max_device_hours: float | None = setting(None, above=0, doc="stop with a checkpoint after this many device-hours")

    def accumulation(self, ranks: int) -> int:
        """Micro-batches a rank passes before each optimizer step. Raises ConfigError when the batch does not divide."""
        micro = self.micro_batch_size or self.global_batch_size // ranks
        if micro == 0 or self.global_batch_size % (ranks * micro):
            self.fail(
                "global_batch_size",
                f"must be a multiple of ranks ({ranks}) x train.micro_batch_size ({self.micro_batch_size}): "
                f"try {max(1, round(self.global_batch_size / (ranks * max(micro, 1)))) * ranks * max(micro, 1)}",
            )
        return self.global_batch_size // (ranks * micro)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    section_name: ClassVar[str] = "tracking"

    trackers: tuple[str, ...] = setting((), doc="wandb, or none; without an API key wandb writes offline files")
    project: str = setting("frugal-moe", doc="project the tracker files the run under")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("wandb",)
        for tracker in self.trackers:
            if tracker not in known:
                raise ConfigError(f"tracking.trackers={tracker!r} is not a tracker{nearest(tracker, (*known, 'none'))}")


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(Section):
    """The meter."""

    section_name: ClassVar[str] = "energy"

    declared_power_w: float | None = setting(
        None, above=0, doc="watts to assume for a machine without sensors; none for the stated default"
    )
    interval_s: float = setting(1.0, at_least=0.1, at_most=60, doc="seconds between sensor readings")


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
