"""Learning rates at the corners of both schedules, and lengths that do not fit."""

import math

import pytest

from moe.config import ModelConfig, OptimConfig, Recipe, RunConfig, TrainConfig
from moe.errors import ConfigError
from moe.schedule import decay_start, learning_rate

MODEL = ModelConfig(
    vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, attention="gqa"
)
COSINE = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)
WSD = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, schedule="wsd", decay_steps=16)
TRUNK = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, schedule="wsd")


@pytest.mark.parametrize(
    ("config", "step", "rate"),
    [
        (COSINE, 0, 0.1),
        (COSINE, 9, 1.0),
        (COSINE, 10, 1.0),
        (COSINE, 55, 0.55),
        (COSINE, 99, 0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90))),
        (COSINE, 100, 0.1),
        (COSINE, 500, 0.1),
        (WSD, 0, 0.1),
        (WSD, 9, 1.0),
        (WSD, 10, 1.0),
        (WSD, 83, 1.0),
        (WSD, 84, 1.0),
        (WSD, 85, 0.1 + 0.9 * (1 - 1 / 4)),
        (WSD, 88, 0.1 + 0.9 * (1 - 1 / 2)),
        (WSD, 99, 0.1 + 0.9 * (1 - math.sqrt(15 / 16))),
        (WSD, 100, 0.1),
        (WSD, 500, 0.1),
        (TRUNK, 0, 0.1),
        (TRUNK, 10, 1.0),
        (TRUNK, 99, 1.0),
        (TRUNK, 500, 1.0),
    ],
)
def test_the_rate_of_a_step_among_a_hundred(config: OptimConfig, step: int, rate: float) -> None:
    """First step, end of the warm-up, begin of the decay, last step, and beyond."""
    assert learning_rate(config, step, 100) == pytest.approx(rate, rel=1e-12)


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    """warmup_steps=0 divides by nothing."""
    for schedule in ("cosine", "wsd"):
        assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0, schedule=schedule), 0, 1) == 2.0


def test_before_the_decay_no_rate_knows_the_length() -> None:
    """A trunk and every run branched from it share the rates of the shared steps, bit for bit."""
    for length in (60, 100, 1000):
        shared = range(decay_start(WSD, length))
        assert [learning_rate(WSD, step, length) for step in shared] == [learning_rate(TRUNK, s, 50) for s in shared]
    assert decay_start(TRUNK, 100) == 100


@pytest.mark.parametrize("config", [WSD, COSINE], ids=["wsd", "cosine"])
def test_rates_rise_then_never_rise_again(config: OptimConfig) -> None:
    """One hill, above 0 and at most the peak."""
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert min(rates) > 0
    assert max(rates) == 1.0


def _recipe(steps: int, **optim: object) -> Recipe:
    return Recipe(
        run=RunConfig(name="x"), model=MODEL, train=TrainConfig(max_steps=steps), optim=OptimConfig(**optim)  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_decay_must_fit_behind_the_warm_up() -> None:
    """One sentence with both fields and the length that would do; exactly fitting is allowed."""
    _recipe(30, schedule="wsd", warmup_steps=10, decay_steps=20)
    with pytest.raises(ConfigError) as caught:
        _recipe(29, schedule="wsd", warmup_steps=10, decay_steps=20)
    assert str(caught.value) == (
        "optim.decay_steps=20 and optim.warmup_steps=10 need more steps than train.max_steps=29; "
        "raise that to at least 30, or shorten them"
    )


def test_a_warm_up_may_be_longer_than_the_run() -> None:
    """Any recipe can be tried for three steps; its rates are those of the whole run's first ones."""
    recipe = _recipe(3, warmup_steps=100)
    assert [learning_rate(recipe.optim, step, 3) for step in range(3)] == pytest.approx([3e-6, 6e-6, 9e-6])


def test_a_cosine_has_no_decay_steps() -> None:
    """The field of the other schedule is refused, not ignored."""
    with pytest.raises(ConfigError, match=r"optim.decay_steps=5 is for optim.schedule=wsd; a cosine has none"):
        OptimConfig(decay_steps=5)
