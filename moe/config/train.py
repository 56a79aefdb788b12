"""The section `train`: the loop."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.config.fields import Section, setting

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The loop: how long, in what batches and precision, how often to look and to save."""

    section_name: ClassVar[str] = "train"

    max_steps: int = setting(1000, at_least=1, doc="optimizer steps of the whole run", may_change=True)
    global_batch_size: int = setting(8, at_least=1, at_most=2**20, doc="sequences an optimizer step, over all ranks")
    micro_batch_size: int | None = setting(
        None, at_least=1, doc="sequences a rank passes at once; none for global_batch_size / ranks", may_change=True
    )
    seq_len: int = setting(256, at_least=2, doc="tokens a sequence")
    precision: Literal["fp32", "bf16", "fp8"] = setting(
        "fp32",
        doc="dtype of matrix products; master weights stay fp32; fp8: those of the routed experts, bf16 elsewhere",
    )
    compile: bool = setting(False, doc="torch.compile the model", may_change=True)
    recompute_layers: int = setting(
        0,
        at_least=0,
        doc="layers, from the first, whose activations are computed again instead of kept",
        may_change=True,
    )
    mtp_loss_weight: float = setting(
        0.3,
        at_least=0,
        doc="weight of multi-token prediction's loss, for the whole run; DeepSeek-V3 used 0.3, then 0.1",
    )
    resume: str = setting(
        "auto", doc="auto: go on from the newest whole checkpoint; never: a new run; or a checkpoint", may_change=True
    )
    eval_every_tokens: int = setting(
        100_000, at_least=1, doc="tokens between evaluations; one is made at the end too", may_change=True
    )
    eval_sequences: int | None = setting(None, at_least=1, doc="validation sequences an evaluation; none for all")
    checkpoint_every_steps: int = setting(
        200, at_least=1, doc="steps between checkpoints; one is made at the end too", may_change=True
    )
    keep_checkpoints: int = setting(2, at_least=1, doc="newest checkpoints kept", may_change=True)
    keep_every_steps: int | None = setting(
        None, at_least=1, doc="checkpoints of steps divisible by this are kept for ever; none for none", may_change=True
    )
    background_checkpoints: bool = setting(
        True, doc="write checkpoints while training goes on, from a copy of the state in memory", may_change=True
    )
    on_spike: Literal["stop", "skip", "rollback"] = setting(
        "stop",
        doc="when loss or gradient are not finite, or spike: end the run, leave the update out, or go back to the "
        "newest checkpoint and pass over the batches since",
        may_change=True,
    )
    spike_sigmas: float | None = setting(
        None,
        above=0,
        doc="a loss or gradient norm this many standard deviations above those of the last 128 steps is a spike; none: "
        "only what is not finite",
        may_change=True,
    )
    log_every_steps: int = setting(1, at_least=1, doc="steps between lines in metrics.jsonl", may_change=True)
    max_kwh: float | None = setting(
        None, above=0, doc="stop with a checkpoint when the run has used this much", may_change=True
    )
    max_device_hours: float | None = setting(
        None, above=0, doc="stop with a checkpoint after this many device-hours", may_change=True
    )
    max_cost: float | None = setting(
        None, above=0, doc="stop with a checkpoint at this cost, by the prices in section energy", may_change=True
    )
    profile_at_step: int | None = setting(
        None,
        at_least=1,
        doc="trace three steps from this one with torch's profiler, into the run's folder profile",
        may_change=True,
    )
    breakdown_every_steps: int = setting(
        20, at_least=1, doc="steps between those whose time is split into components", may_change=True
    )

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

    def micro_batch(self, ranks: int) -> int:
        """Sequences a rank passes at once. Raises ConfigError when the batch does not divide."""
        return self.global_batch_size // (ranks * self.accumulation(ranks))
