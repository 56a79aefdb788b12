"""The section `optim`: the optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe.config.fields import Section, setting

__all__ = ["OptimConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW, or Muon with AdamW for what is no hidden matrix; warm-up, then a cosine or a level with a decay."""

    section_name: ClassVar[str] = "optim"

    name: Literal["adamw", "muon"] = setting(
        "adamw", doc="muon: hidden matrices by Muon, all else by AdamW, with the same lr and weight_decay"
    )
    lr: float = setting(3e-4, above=0, doc="peak learning rate")
    min_lr_ratio: float = setting(0.1, at_least=0, at_most=1, doc="final learning rate as a share of the peak")
    warmup_steps: int = setting(100, at_least=0, doc="steps of linear warm-up")
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine", doc="after the warm-up: a half cosine, or level until the last decay_steps (warm-up-stable-decay)"
    )
    decay_steps: int = setting(
        0, at_least=0, doc="last steps of train.max_steps in which wsd decays; 0 for a trunk, which never does"
    )
    beta1: float = setting(0.9, at_least=0, below=1, doc="decay of AdamW's first moment")
    beta2: float = setting(0.95, at_least=0, below=1, doc="decay of AdamW's second moment")
    eps: float = setting(1e-8, above=0, doc="AdamW's epsilon")
    muon_momentum: float = setting(0.95, at_least=0, below=1, doc="decay of Muon's momentum (Nesterov's)")
    weight_decay: float = setting(0.1, at_least=0, doc="decay of matrices; norms, embeddings and routers have none")
    grad_clip: float = setting(1.0, above=0, doc="largest norm of the gradient")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule == "cosine" and self.decay_steps:
            self.fail("decay_steps", "is for optim.schedule=wsd; a cosine has none, so leave it 0")

    def check_length(self, max_steps: int) -> None:
        """Raise ConfigError when the decay does not fit behind the warm-up of a run of this many steps.

        A warm-up longer than the run is none: a recipe may be tried for a few steps.
        """
        if self.decay_steps and self.warmup_steps + self.decay_steps > max_steps:
            self.fail(
                "decay_steps",
                f"and optim.warmup_steps={self.warmup_steps} need more steps than train.max_steps={max_steps}; "
                f"raise that to at least {self.warmup_steps + self.decay_steps}, or shorten them",
            )
