"""The learning rate of a step: linear warm-up, then a half cosine, or level with a decay at the end.

    warm-up   lr (s + 1) / W                                          s < W
    cosine    low + (lr - low) (1 + cos(pi (s - W) / (N - W))) / 2    W <= s < N
    wsd       lr                                                      W <= s < N - Z
              low + (lr - low) (1 - sqrt((s - N + Z) / Z))            N - Z <= s < N

with s the step from 0, W warmup_steps, N max_steps, Z decay_steps, low = lr min_lr_ratio. Both reach `low` one step
after the last. Warm-up-stable-decay: MiniCPM, arXiv:2404.06395; the shape 1 - sqrt: arXiv:2405.18392, which found it
better than a line. Before the decay no rate of it depends on N, so a run may go on, or branch, without having known.
"""

import math

from moe.config import OptimConfig

__all__ = ["decay_start", "learning_rate"]


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Rate of optimizer step `step`, from 0, in a run of `max_steps`. A pure function: a resumed run has the same."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = _cosine(config, step, max_steps) if config.schedule == "cosine" else _decay(config, step, max_steps)
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * left


def decay_start(config: OptimConfig, max_steps: int) -> int:
    """The step from which rates depend on `max_steps`: what was learnt in those before it holds for any length."""
    return config.warmup_steps if config.schedule == "cosine" else max_steps - config.decay_steps


def _cosine(config: OptimConfig, step: int, max_steps: int) -> float:
    done = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _decay(config: OptimConfig, step: int, max_steps: int) -> float:
    done = step - decay_start(config, max_steps)
    if done <= 0 or config.decay_steps == 0:
        return 1.0
    return 1 - math.sqrt(min(1.0, done / config.decay_steps))
