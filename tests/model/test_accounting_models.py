"""Parameters, operations and cache of published models, by arithmetic alone, against counts made from their papers."""

import doctest
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moe.accounting import cache_bytes_per_token, flops_per_token, num_parameters, parameters, twin_residual
from moe.config import ModelConfig
from moe.model import Transformer

ROOT = Path(__file__).resolve().parents[2]


class Published(NamedTuple):
    """A model, and what was counted from its source: parameters, and 10^9 FLOPs a token at 4,096 tokens.

    total: selection biases with it, multi-token prediction not. active: without the input embedding. FLOPs: 6 x active
    plus 6 x layers x heads x (qk + v width) x 4096 / 2, to three decimals.
    """

    config: ModelConfig
    total: int
    active: int
    gflop: float


def _latent(vocab: int, hidden: int, layers: int, heads: int, dense: int, **more: object) -> ModelConfig:
    """DeepSeek's latent attention: the widths of all their models, and of Kimi K2."""
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=dense, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _grouped(
    vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, dense: int, **more: object
) -> ModelConfig:
    """Heads of 128 unless told; multi-head attention has as many key and value heads as heads."""
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, attention="gqa",
        num_key_value_heads=kv_heads, intermediate_size=dense,
        **{"head_dim": 128, **more},  # type: ignore[arg-type]
    )  # fmt: skip


def _experts(routed: int, top_k: int, width: int, shared: int = 0, dense: int = 0, bias: bool = False) -> dict:
    """Routed experts, chosen a token, their width; shared experts, first dense layers, selection biases."""
    return {
        "n_routed_experts": routed, "num_experts_per_tok": top_k, "moe_intermediate_size": width,
        "n_shared_experts": shared, "first_k_dense_replace": dense, "topk_method": "noaux_tc" if bias else "greedy",
    }  # fmt: skip


DEEPSEEK_V3 = _latent(129280, 7168, 61, 128, 18432, q_lora_rank=1536, **_experts(256, 8, 2048, 1, 3, bias=True))

# A model's width of dense layers is of no matter where it has none.
MODELS = {
    # deepseek-ai/DeepSeek-V3 inference/configs/config_16B.json; arXiv:2405.04434 appendix B
    "DeepSeek-V2-Lite": Published(
        _latent(102400, 2048, 27, 16, 10944, **_experts(64, 6, 1408, 2, 1)), 15706484224, 2451435008, 16.407
    ),
    # deepseek-ai/DeepSeek-V3 inference/configs/config_236B.json; arXiv:2405.04434 section 3.1.2
    "DeepSeek-V2": Published(
        _latent(102400, 5120, 60, 128, 12288, q_lora_rank=1536, **_experts(160, 6, 1536, 2, 1)),
        235741434880, 20851512320, 155.308,
    ),
    # deepseek-ai/DeepSeek-V3 inference/configs/config_671B.json; the main model
    "DeepSeek-V3": Published(DEEPSEEK_V3, 671026419200, 36625618432, 250.456),
    # MoonshotAI/Kimi-K2 README; latent ranks and vocabulary from the public config
    "Kimi-K2": Published(
        _latent(163840, 7168, 61, 64, 18432, q_lora_rank=1536, **_experts(384, 8, 2048, 1, 1, bias=True)),
        1026408232448, 31687095808, 205.474,
    ),
    # arXiv:2401.06066 table 7; intermediate sizes from the public config
    "DeepSeekMoE-16B": Published(
        _grouped(102400, 2048, 28, 16, 16, 10944, **_experts(64, 6, 1408, 2, 1)), 16375728128, 2618935296, 17.123
    ),
    # arXiv:2401.04088 table 1
    "Mixtral-8x7B": Published(
        _grouped(32000, 4096, 32, 32, 8, 14336, **_experts(8, 2, 14336)), 46702792704, 12748853248, 79.714
    ),
    # Mistral's release; public config of v0.3
    "Mixtral-8x22B": Published(
        _grouped(32768, 6144, 56, 48, 8, 16384, **_experts(8, 2, 16384)), 140630071296, 38960142336, 242.217
    ),
    # allenai/OLMoE configs/OLMoE-1B-7B-0924.yml
    "OLMoE-1B-7B-0924": Published(
        _grouped(50304, 2048, 16, 16, 16, 1024, qk_norm="full", **_experts(64, 8, 1024)),
        6919161856, 1178994688, 7.879,
    ),
    # pytorch/torchtitan models/qwen3; arXiv:2505.09388
    "Qwen3-30B-A3B": Published(
        _grouped(151936, 2048, 48, 32, 4, 768, qk_norm="head", **_experts(128, 8, 768)),
        30532122624, 3041867776, 23.083,
    ),
    # pytorch/torchtitan models/qwen3; arXiv:2505.09388
    "Qwen3-235B-A22B": Published(
        _grouped(151936, 4096, 94, 64, 4, 1536, qk_norm="head", **_experts(128, 8, 1536)),
        235093634560, 21568433664, 148.335,
    ),
    # Llama: public configs; totals also by Hugging Face's safetensors.total, Llama 2's less its rotary buffers
    "Llama-2-7B": Published(_grouped(32000, 4096, 32, 32, 32, 11008), 6738415616, 6607343616, 42.865),
    "Llama-2-13B": Published(_grouped(32000, 5120, 40, 40, 40, 13824), 13015864320, 12852024320, 82.145),
    "Llama-2-70B": Published(_grouped(32000, 8192, 80, 64, 8, 28672), 68976648192, 68714504192, 428.393),
    "Llama-3.1-8B": Published(_grouped(128256, 4096, 32, 32, 8, 14336), 8030261248, 7504924672, 48.251),
    "Llama-3.1-70B": Published(_grouped(128256, 8192, 80, 64, 8, 28672), 70553706496, 69503033344, 433.124),
    "Llama-3.1-405B": Published(_grouped(128256, 16384, 126, 128, 8, 53248), 405853388800, 403752042496, 2473.247),
    # Qwen2.5's public config: biases of queries, keys and values, none of the output projection
    "Qwen2.5-72B": Published(
        _grouped(152064, 8192, 80, 64, 8, 29568, attention_bias=True, attention_output_bias=False),
        72706203648, 71460495360, 444.869,
    ),
}  # fmt: skip


class Lacking(NamedTuple):
    """A model that ModelConfig cannot say, with the nearest it can; `layer_*`: parameters a layer still to be added.

    windowed: layers that attend to 128 tokens only.
    """

    nearest: Published
    layer_total: int
    layer_active: int
    windowed: int = 0


GPT_OSS = {"head_dim": 64, "attention_bias": True}
LACKING = {
    # openai/gpt-oss gpt_oss/torch/model.py; model card table 1. Attention sinks (a number a head), biases of the router
    # and of the experts' two matrices, of which a token passes four experts'; a window on every second layer.
    "gpt-oss-120b": Lacking(
        Published(
            _grouped(201088, 2880, 36, 64, 8, 2880, **GPT_OSS, **_experts(128, 4, 2880)),
            116829156672, 5132849472, 32.722,
        ),
        64 + 128 + 128 * 3 * 2880,
        64 + 128 + 4 * 3 * 2880,
        windowed=18,
    ),
    "gpt-oss-20b": Lacking(
        Published(
            _grouped(201088, 2880, 24, 64, 8, 2880, **GPT_OSS, **_experts(32, 4, 2880)),
            20914757184, 3608307264, 22.933,
        ),
        64 + 32 + 32 * 3 * 2880,
        64 + 32 + 4 * 3 * 2880,
        windowed=12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_exact(name: str) -> None:
    """Total, active with and without embeddings; FLOPs to the last decimal of the source."""
    config, total, active, gflop = MODELS[name]
    assert num_parameters(config) == total
    assert num_parameters(config, active=True) == active
    assert flops_per_token(config, 4096) == pytest.approx(gflop * 1e9, abs=0.0005e9)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_has_as_many(name: str) -> None:
    """Shapes of the real module, on the meta device."""
    with torch.device("meta"):
        model = Transformer(MODELS[name].config)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) == MODELS[name].total


@pytest.mark.parametrize("name", LACKING)
def test_what_is_lacking_is_the_whole_difference(name: str) -> None:
    """The nearest configuration differs by what it lacks and by nothing else."""
    (config, total, active, gflop), layer_total, layer_active, windowed = LACKING[name]
    layers, heads_width = config.num_hidden_layers, config.num_attention_heads * 2 * config.qk_head_dim
    assert num_parameters(config) + layers * layer_total == total
    assert num_parameters(config, active=True) + layers * layer_active == active
    flops = flops_per_token(config, 4096) + 6 * layers * layer_active - 6 * windowed * heads_width * (4096 / 2 - 128)
    assert flops == pytest.approx(gflop * 1e9, abs=0.0005e9)


def test_the_two_other_conventions_follow() -> None:
    """Active parameters are also counted with both embeddings (Mixtral, Qwen3) or with neither; DeepSeek-V3's."""
    embedding, head = parameters(DEEPSEEK_V3)["embedding"], parameters(DEEPSEEK_V3, active=True)["head"]
    assert num_parameters(DEEPSEEK_V3, active=True) + embedding == 37552297472
    assert num_parameters(DEEPSEEK_V3, active=True) - head == 35698939392


def test_multi_token_prediction_of_deepseek_v3() -> None:
    """README_WEIGHTS says 11.5B parameters of its own and 2.4B active with embedding and head; that is the module's
    decoder layer, without the matrix that joins embedding and hidden state (0.1B). One token's answer has no part of
    it; a training step does."""
    config = DEEPSEEK_V3.replace(num_nextn_predict_layers=1)
    own, joining, matrix = parameters(config)["mtp"], 2 * 7168 * 7168, 129280 * 7168
    assert own == 11_610_068_224
    assert (own - joining) / 1e9 == pytest.approx(11.5, abs=0.05)
    assert num_parameters(config) == 671_026_419_200 + own
    assert num_parameters(config, active=True) == 36_625_618_432

    active = own - 3 * 7168 * 2048 * (256 - 8)
    assert (active - joining + 2 * matrix) / 1e9 == pytest.approx(2.4, abs=0.05)
    attention = 6 * 128 * (192 + 128) * 4096 / 2
    further = flops_per_token(config, 4096) - flops_per_token(DEEPSEEK_V3, 4096)
    assert further == pytest.approx(6 * (active + matrix) + attention)


def test_twins_are_compared_without_multi_token_prediction() -> None:
    """Neither the twin's size nor its distance depends on it."""
    config = DEEPSEEK_V3.replace(num_nextn_predict_layers=1)
    twin = config.dense_twin(match="total")
    assert twin == DEEPSEEK_V3.dense_twin(match="total")
    assert twin_residual(config, twin, active=False) == twin_residual(DEEPSEEK_V3, twin, active=False)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("DeepSeek-V3", 70_272),  # arXiv:2505.09343 table 1, as the last two
        ("DeepSeek-V2", 69_120),
        ("DeepSeek-V2-Lite", 31_104),
        ("Llama-3.1-405B", 516_096),
        ("Qwen2.5-72B", 327_680),
    ],
)
def test_cache_of_published_models(name: str, wanted: int) -> None:
    """Bytes a token in bf16."""
    assert cache_bytes_per_token(MODELS[name].config, 2) == wanted


def test_null_experts_count_by_what_is_computed() -> None:
    """With as many null experts as real ones half of the choices compute nothing; the router has twice the rows."""
    model = MODELS["DeepSeek-V2-Lite"].config
    halved = model.replace(num_experts_per_tok=6, n_null_experts=64)
    assert halved.mean_experts_per_tok == 3
    three = parameters(model.replace(num_experts_per_tok=3), active=True)
    assert parameters(halved, active=True) == {**three, "router": 2 * three["router"]}
    assert parameters(halved) == {**parameters(model), "router": 2 * three["router"]}
    assert flops_per_token(model, 4096) - flops_per_token(halved, 4096) == 6 * 26 * (3 * 3 * 2048 * 1408 - 64 * 2048)
    # measured: a share of 1/3 is two experts of six
    third = flops_per_token(halved, 4096, computed_share=1 / 3)
    assert flops_per_token(halved, 4096) - third == pytest.approx(6 * 26 * 3 * 2048 * 1408)
    assert flops_per_token(halved, 4096, computed_share=0.5) == flops_per_token(halved, 4096)
    assert halved.dense_twin().intermediate_size == model.replace(num_experts_per_tok=3).dense_twin().intermediate_size


def test_the_page_has_these_numbers() -> None:
    """docs/accounting.md: one row a model, as computed here."""
    rows = [
        f"| {name} | {num_parameters(config):,} | {num_parameters(config, active=True):,} "
        f"| {flops_per_token(config, 4096) / 1e9:,.3f} | {cache_bytes_per_token(config, 2):,} |"
        for name, (config, *_) in MODELS.items()
    ]
    page = (ROOT / "docs/accounting.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| [A-Z].*-[A-Z0-9].*\|$", page, flags=re.MULTILINE) == rows, "\n".join(rows)


def test_the_pages_examples_print_what_they_print() -> None:
    """docs/accounting.md as doctests."""
    page = (ROOT / "docs/accounting.md").read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"```pycon\n(.*?)```", page, flags=re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, "docs/accounting.md", None, 0)
    failed, tried = doctest.DocTestRunner().run(test)
    assert tried == 8
    assert not failed
