"""The section `optim`: the optimizer and the schedule of its learning rate."""

from dataclasses import dataclass
from typing import ClassVar

from moe.config.fields import Section, setting

__all__ = ["OptimConfig"]


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
