"""Configuration: bad values are one sentence that names field, value and mend; good ones survive a round trip."""

import dataclasses
import json

import pytest

from moe import accounting
from moe.config import BalanceConfig, ModelConfig, Recipe, RunConfig, TrainConfig, parse_overrides
from moe.config.parse import help_text
from moe.errors import ConfigError

MLA = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MODEL = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, **MLA,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip
RECIPE = Recipe(run=RunConfig(name="x"), model=MODEL)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train.max_step=3"], "train.max_step=3: no field 'max_step' in section 'train'; did you mean 'max_steps'?"),
        (["trian.max_steps=3"], "trian.max_steps=3: no section 'trian'; did you mean 'train'?"),
        (["train.lr=3"], "train.lr=3: no field 'lr' in section 'train'; did you mean 'optim.lr'?"),
        (["max_steps=3"], "'max_steps=3' is not of the form section.field=value, for example train.max_steps=100"),
        (["--fast"], "'--fast' is not of the form section.field=value, for example train.max_steps=100"),
        (["train.max_steps=ten"], "train.max_steps=ten must be a whole number"),
        (["train.max_steps=1.5"], "train.max_steps=1.5 must be a whole number"),
        (["train.max_steps=0"], "train.max_steps=0 must be at least 1"),
        (["train.compile=maybe"], "train.compile=maybe must be true or false"),
        (["train.precision=fp64"], "train.precision='fp64' must be one of 'fp32', 'bf16', 'fp8'"),
        (["optim.lr=nan"], "optim.lr=nan must be a number"),
        (["energy.interval_s=5.5"], "energy.interval_s=5.5 must be at most 5"),
        (["optim.beta1=1"], "optim.beta1=1.0 must be below 1"),
        (["tracking.trackers=wandbb"], "tracking.trackers='wandbb' is not a tracker; did you mean 'wandb'?"),
        (
            ["model.num_experts_per_tok=9"],
            "model.num_experts_per_tok=9 must be between 1 and n_routed_experts (8)",
        ),
        (["model.n_group=3"], "model.n_group=3 must divide n_routed_experts (8)"),
        (["model.qk_rope_head_dim=3"], "model.qk_rope_head_dim=3 must be even: rotary positions turn pairs"),
        (
            ["model.rope_factor=4"],
            "model.rope_factor=4.0 says how far, but not how: set model.rope_type to linear, llama3 or yarn",
        ),
        (
            ["model.rope_type=llama3"],
            "model.rope_type='llama3' needs model.rope_factor above 1: how far positions are stretched",
        ),
        (["model.rope_low_freq_factor=4"], "model.rope_low_freq_factor=4.0 must be below rope_high_freq_factor (4)"),
        (["model.clip_qkv=8"], "model.clip_qkv=8.0 is for attention='gqa': leave it none"),
        (
            ["model.kv_lora_rank=0"],
            "model.kv_lora_rank=0 is needed by attention='mla': give it, or set model.attention=gqa",
        ),
        (
            ["model.first_k_dense_replace=3"],
            "model.first_k_dense_replace=3 leaves no layer for the experts: "
            "make it less than num_hidden_layers (3)",
        ),
        (
            ["train.seq_len=5000"],
            "train.seq_len=5000 exceeds model.max_position_embeddings (4096); raise that too",
        ),
        (
            ["model.topk_method=greedy"],
            "balance.method='sign' moves expert biases, which only model.topk_method=noaux_tc has; use that, or none",
        ),
    ],
)  # fmt: skip
def test_a_bad_word_is_one_sentence(words: list[str], sentence: str) -> None:
    """Each mistake names field, value and mend, word for word."""
    with pytest.raises(ConfigError) as raised:
        parse_overrides(RECIPE, words)
    assert str(raised.value) == sentence


def test_words_set_fields_of_every_type() -> None:
    """Numbers, switches, lists, none, and numbers with underscores; the last of two words for one field counts."""
    recipe = parse_overrides(
        RECIPE,
        ["train.max_steps=1_000", "train.max_steps=7", "optim.lr=1e-2", "train.compile=true", "train.max_kwh=0.5",
         "tracking.trackers=wandb", "model.q_lora_rank=16", "run.name=other"],
    )  # fmt: skip
    assert (recipe.train.max_steps, recipe.optim.lr, recipe.train.compile) == (7, 0.01, True)
    assert (recipe.train.max_kwh, recipe.tracking.trackers, recipe.model.q_lora_rank) == (0.5, ("wandb",), 16)
    again = parse_overrides(recipe, ["model.q_lora_rank=none", "tracking.trackers=none", "train.max_kwh=none"])
    assert (again.model.q_lora_rank, again.tracking.trackers, again.train.max_kwh) == (None, (), None)


def test_fields_that_depend_on_each_other_change_together() -> None:
    """Words are checked after all of them are applied, in any order."""
    recipe = parse_overrides(RECIPE, ["model.num_experts_per_tok=12", "model.n_routed_experts=16"])
    assert recipe.model.num_experts_per_tok == 12


def test_a_recipe_survives_json() -> None:
    """config.json holds everything: what is read back is equal."""
    assert Recipe.from_dict(json.loads(json.dumps(RECIPE.to_dict()))) == RECIPE


def test_a_config_of_another_version_is_refused() -> None:
    """An unknown field in a file is an error, not silently dropped."""
    values = RECIPE.to_dict()
    values["model"]["n_routed_expert"] = 3
    with pytest.raises(ConfigError, match=r"model\.n_routed_expert is not a field; did you mean 'n_routed_experts'\?"):
        Recipe.from_dict(values)


def test_configurations_are_frozen() -> None:
    """A run cannot change under its log."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.hidden_size = 64  # type: ignore[misc]


def test_help_names_every_field() -> None:
    """`--help` lists each field with this recipe's value."""
    text = help_text(RECIPE)
    for name, section in RECIPE.sections().items():
        for field in dataclasses.fields(section):
            assert f"  {name}.{field.name}=" in text


@pytest.mark.parametrize(("ranks", "micro", "steps"), [(1, None, 1), (2, None, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_accumulation_fills_the_global_batch(ranks: int, micro: int | None, steps: int) -> None:
    """ranks x micro_batch_size x accumulation = global_batch_size."""
    train = TrainConfig(global_batch_size=8, micro_batch_size=micro)
    assert train.accumulation(ranks) == steps


@pytest.mark.parametrize(("ranks", "micro"), [(3, None), (2, 3), (16, None)])
def test_a_batch_that_does_not_divide_is_refused(ranks: int, micro: int | None) -> None:
    """The sentence offers a size that works, and that size does work."""
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=8 must be a multiple of ranks") as raised:
        TrainConfig(global_batch_size=8, micro_batch_size=micro).accumulation(ranks)
    offered = int(str(raised.value).rsplit(" ", 1)[1])
    assert TrainConfig(global_batch_size=offered, micro_batch_size=micro).accumulation(ranks) >= 1


DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, intermediate_size=18432,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
    first_k_dense_replace=3, n_group=8, topk_group=4,
)  # fmt: skip


def test_deepseek_v3_counts_are_the_published_ones() -> None:
    """671,026,419,200 parameters without the MTP module; 36.6e9 active without the input embedding."""
    assert accounting.num_parameters(DEEPSEEK_V3) == 671_026_419_200
    assert accounting.num_parameters(DEEPSEEK_V3, active=True) == 36_625_618_432
    assert accounting.flops_per_token(DEEPSEEK_V3, 4096) == pytest.approx(250.456e9, rel=1e-5)


def test_active_twin_has_the_active_parameters() -> None:
    """Same depth, width and attention; every layer dense; parameters within the rounding the residual states."""
    twin = DEEPSEEK_V3.dense_twin(match="active")
    assert not twin.is_moe
    assert (twin.num_hidden_layers, twin.hidden_size, twin.kv_lora_rank) == (61, 7168, 512)
    assert twin.intermediate_size == 18432  # nine experts of 2048, and what the dense layers have
    assert abs(accounting.twin_residual(DEEPSEEK_V3, twin)) < 0.005


def test_total_twin_has_the_total_parameters() -> None:
    """Depth and width grow until the totals are nearest."""
    twin = MODEL.dense_twin(match="total")
    assert not twin.is_moe
    assert twin.num_attention_heads > MODEL.num_attention_heads
    assert abs(accounting.twin_residual(MODEL, twin, active=False)) < 0.05  # 16 columns are much in a model this small
    large = DEEPSEEK_V3.dense_twin(match="total")
    assert abs(accounting.twin_residual(DEEPSEEK_V3, large, active=False)) < 0.005


def test_balance_checks_itself() -> None:
    """A section made in Python is checked like one from the command line."""
    with pytest.raises(ConfigError, match=r"balance\.bias_update_speed=0\.0 must be above 0"):
        BalanceConfig(bias_update_speed=0.0)
