"""The transformer as a class of its own: sizes, files, precision, positions."""

import json
from pathlib import Path

import pytest
import torch

from moe.config import ModelConfig
from moe.errors import CheckpointError
from moe.model import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12,
)  # fmt: skip
DENSE = CONFIG.dense_twin()
GQA = CONFIG.replace(attention="gqa", num_key_value_heads=1, qk_norm="full", attention_bias=True)
NO_BIAS = CONFIG.replace(topk_method="greedy", score_func="softmax", q_lora_rank=10, attention_bias=True)
TIED = CONFIG.replace(tie_word_embeddings=True)
MTP = GQA.replace(num_nextn_predict_layers=2, first_k_dense_replace=1)
DENSE_MTP = DENSE.replace(num_nextn_predict_layers=1)


@pytest.mark.parametrize("config", [CONFIG, DENSE, GQA, NO_BIAS, TIED, GQA.replace(qk_norm="head"), MTP, DENSE_MTP])
def test_accounting_counts_what_is_allocated(config: ModelConfig) -> None:
    """The arithmetic total equals parameters plus selection biases, tensor by tensor."""
    model = Transformer(config)
    allocated = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert model.num_parameters() == allocated


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_save_and_load_is_bitwise(config: ModelConfig, tmp_path: Path) -> None:
    """Every tensor comes back equal, a tied matrix stays tied, the bias stays fp32."""
    model = Transformer(config)
    model.layers[0].mlp.router.expert_bias.uniform_(-1, 1)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == config.tie_word_embeddings


def test_loading_what_is_not_ours_is_one_sentence(tmp_path: Path) -> None:
    """Missing folder, foreign config, another architecture."""
    with pytest.raises(CheckpointError, match="cannot be read"):
        Transformer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is not one of ours"):
        Transformer.from_pretrained(tmp_path)
    Transformer(CONFIG).save_pretrained(tmp_path)
    other = {"format": "frugal-moe", "model": CONFIG.replace(hidden_size=48).to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="another architecture"):
        Transformer.from_pretrained(tmp_path)


def test_casts_leave_the_expert_bias_in_fp32() -> None:
    """A bf16 bias could not take steps of 0.001: its values survive the cast unrounded."""
    model = Transformer(CONFIG)
    router = model.layers[0].mlp.router
    router.expert_bias.fill_(2.0 + 0.001)
    model.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, torch.full((6,), 2.001))
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.dtype == torch.bfloat16


def test_attention_is_causal() -> None:
    """A later token changes no earlier logit, though it shares experts and batch with them."""
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    ids = torch.randint(0, 61, (1, 12))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-6, rtol=0)
    assert (before[:, 8:] - after[:, 8:]).abs().amax() > 1e-3


@pytest.mark.parametrize("config", [CONFIG, GQA])
def test_only_distances_between_positions_matter(config: ModelConfig) -> None:
    """Rotary positions: the same offset on every position changes nothing; stretching them does."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    ids, positions = torch.randint(0, 61, (2, 9)), torch.arange(9)[None].expand(2, -1)
    plain = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=positions + 100).logits, plain, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # initial weights attend almost evenly; sharper ones show positions
    assert (model(ids, position_ids=positions * 3).logits - model(ids).logits).abs().amax() > 1e-3


@pytest.mark.parametrize("config", [CONFIG, GQA])
def test_bf16_autocast_computes_every_product_in_bf16(config: ModelConfig) -> None:
    """Experts cast themselves, scores stay fp32, gradients come back in fp32 and near the fp32 ones."""
    torch.manual_seed(0)
    model = Transformer(config)
    ids = torch.randint(0, 61, (2, 16))
    model(ids, labels=ids).loss.backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen: dict[str, torch.dtype] = {}
    model.layers[0].mlp.experts.register_forward_hook(lambda m, a, out: seen.update(experts=out.dtype))
    model.layers[0].mlp.router.register_forward_hook(lambda m, a, out: seen.update(scores=out.scores_TE.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert seen == {"experts": torch.bfloat16, "scores": torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - exact[name]).norm() / exact[name].norm().clamp_min(1e-12)
        assert error < 0.05, f"{name}: bf16 keeps 8 bits, so a few percent over the whole depth, not {error}"


@pytest.mark.parametrize("initialization", ["normal", "scaled"])
def test_initial_weights(initialization: str) -> None:
    """normal: one deviation everywhere; scaled: smaller where a layer writes to the residual stream. Norms are ones."""
    torch.manual_seed(0)
    config = CONFIG.replace(
        initialization=initialization, initializer_range=0.006, hidden_size=96, intermediate_size=200,
        moe_intermediate_size=100, num_hidden_layers=8, first_k_dense_replace=4, vocab_size=500, attention_bias=True,
        num_nextn_predict_layers=1,
    )  # fmt: skip
    model = Transformer(config)
    to_residual = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
            to_residual += writes
            wanted = 0.006 / 4 if writes and initialization == "scaled" else 0.006
            error = 5 * wanted * (2 * parameter.numel()) ** -0.5  # five standard errors of a deviation
            assert abs(parameter.std().item() - wanted) < error, name
    assert to_residual == 2 * 9 + 5  # attention and feed-forward of each layer, shared experts beside routed ones
