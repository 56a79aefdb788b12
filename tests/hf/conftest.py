"""Small random models of every family, the same for the same seed, and transformers' class of the same weights."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import moe.hf
from moe import ModelConfig, Transformer

FAMILIES = ("deepseek_v3", "deepseek_v2", "mixtral", "qwen3_moe", "olmoe", "llama", "qwen2", "qwen3")
SEEDS = 30


class Pair(NamedTuple):
    """One model twice: ours, and what transformers makes of the directory we saved."""

    ours: Transformer
    theirs: nn.Module
    directory: Path
    family: str


def random_config(family: str, seed: int) -> ModelConfig:
    """Odd sizes and odd numbers of experts included; every choice a family leaves open is drawn."""
    draw = random.Random(f"{family} {seed}")
    heads = draw.choice((2, 4))
    fields: dict[str, Any] = dict(
        vocab_size=draw.randint(30, 99),
        hidden_size=draw.choice((16, 24, 32, 48, 64)),
        num_hidden_layers=draw.randint(1, 3),
        num_attention_heads=heads,
        intermediate_size=draw.randint(9, 40),
        tie_word_embeddings=draw.random() < 0.4,
        rope_theta=draw.choice((500.0, 10000.0, 1e6)),
        max_position_embeddings=64,
        **_stretching(draw),
    )
    if family.startswith("deepseek"):
        fields.update(_latent_attention(draw, even=family == "deepseek_v2"))
    else:
        fields.update(_grouped_attention(draw, family, heads))
    if family not in ("llama", "qwen2", "qwen3"):
        fields.update(_experts(draw, family, fields["num_hidden_layers"]))
    return ModelConfig(**fields)


def _stretching(draw: random.Random) -> dict[str, Any]:
    """Contexts so short that a few pairs are of every sort: kept, blended and slowed down."""
    kind = draw.choice(("default", "linear", "llama3", "llama3", "yarn", "yarn"))
    if kind == "default":
        return {}
    fields: dict[str, Any] = dict(rope_type=kind, rope_factor=draw.choice((1.5, 4.0, 16.0)))
    if kind == "linear":
        return fields
    fields.update(rope_original_max_position_embeddings=draw.choice((4, 8, 16)))
    if kind == "llama3":
        low = draw.choice((0.02, 0.2, 1.0))
        return {**fields, "rope_low_freq_factor": low, "rope_high_freq_factor": low * draw.choice((1.5, 4.0, 20.0))}
    return dict(
        **fields,
        rope_beta_fast=draw.choice((4.0, 32.0)),
        rope_mscale=draw.choice((0.0, 0.7, 1.0)),
        rope_mscale_all_dim=draw.choice((0.0, 0.5, 1.0)),
    )


def _latent_attention(draw: random.Random, *, even: bool) -> dict[str, Any]:
    """transformers' V2 views fp32 positions as complex numbers, which fails behind an odd number of columns."""
    step = 2 if even else 1
    return dict(
        attention="mla",
        q_lora_rank=draw.choice((None, 5, 16)),
        kv_lora_rank=draw.randrange(4, 21, step),
        qk_nope_head_dim=draw.randrange(2, 11, step),
        qk_rope_head_dim=draw.choice((2, 4, 8)),
        v_head_dim=draw.randint(3, 9),
        attention_bias=draw.random() < 0.5,
        rms_norm_eps=draw.choice((1e-6, 1e-6, 1e-2)),  # large: that the latents' is another must show
    )


def _grouped_attention(draw: random.Random, family: str, heads: int) -> dict[str, Any]:
    free = family != "olmoe"  # whose heads share the hidden size
    return dict(
        attention="gqa",
        num_key_value_heads=draw.choice((1, heads // 2, heads)),
        head_dim=draw.choice((None, 6, 16)) if free else None,
        rms_norm_eps=draw.choice((1e-6, 1e-5)),
        attention_bias=family == "qwen2" or (family != "mixtral" and draw.random() < 0.5),
        attention_output_bias=False if family == "qwen2" else None,
        qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(family, "none"),
        clip_qkv=draw.choice((None, None, 0.3, 1.0)) if family == "olmoe" else None,  # at times most entries
    )


def _experts(draw: random.Random, family: str, layers: int) -> dict[str, Any]:
    fields: dict[str, Any] = dict(moe_intermediate_size=draw.randint(5, 24))
    grouped = family == "deepseek_v3" or (family == "deepseek_v2" and draw.random() < 0.5)
    groups = draw.choice((1, 2, 3, 4)) if grouped else 1
    experts = groups * draw.randint(2, 5) if grouped else draw.randint(3, 9)
    kept = draw.randint(1, groups)
    fields.update(n_routed_experts=experts, num_experts_per_tok=draw.randint(1, min(4, kept * experts // groups)))
    if family.startswith("deepseek"):
        fields.update(
            n_shared_experts=draw.randint(1, 2),
            first_k_dense_replace=draw.randint(0, layers - 1),
            routed_scaling_factor=draw.choice((1.0, 2.5, 16.0)),
            n_group=groups,
            topk_group=kept,
        )
    if family == "deepseek_v3":
        return {**fields, "norm_topk_prob": draw.random() < 0.7}
    method = "group_limited_greedy" if grouped else "greedy"
    normalised = family == "mixtral" or (family != "deepseek_v2" and draw.random() < 0.5)
    if family == "qwen3_moe":
        fields["first_k_dense_replace"] = draw.randint(0, layers - 1)
    return {**fields, "score_func": "softmax", "topk_method": method, "norm_topk_prob": normalised}


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """Weights well away from initial ones, biases far from zero mean."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            norm = name.endswith("norm.weight")
            tensor.copy_(torch.randn_like(tensor) * 0.2 + norm)
        for _, bias in model.named_buffers():
            bias.copy_(torch.randn_like(bias) * 0.3 + 2.0)
    return model


def their_model(directory: Path, **options: Any) -> nn.Module:
    """What transformers loads, by its plainest code paths; nothing missing, nothing left over."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # YaRN factors here are drawn, not derived from lengths
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def their_name(name: str) -> str:
    """Our parameter's name in transformers' modules, which are alike in all families."""
    name = name.replace("mlp.router.weight", "mlp.gate.weight")
    return name if name.startswith("lm_head") else f"model.{name}"


@pytest.fixture
def draw() -> Callable[..., Transformer]:
    """draw(family, seed, **changes) -> a random model of ours."""

    def make(family: str, seed: int = 0, **changes: Any) -> Transformer:
        return random_model(random_config(family, seed).replace(**changes), seed)

    return make


@pytest.fixture
def transformers_load() -> Callable[..., nn.Module]:
    return their_model


@pytest.fixture
def hub_name() -> Callable[[str], str]:
    return their_name


@pytest.fixture(scope="module", params=[f"{family}-{seed}" for family in FAMILIES for seed in range(SEEDS)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Every family, `SEEDS` random models each."""
    family, _, seed = request.param.rpartition("-")
    directory = tmp_path_factory.mktemp(request.param)
    ours = random_model(random_config(family, int(seed)), int(seed))
    moe.hf.save(ours, directory)
    return Pair(ours, their_model(directory), directory, family)
