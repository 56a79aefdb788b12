"""What each parameter of a model with everything gets from the optimizers, and that selection biases are unknown."""

import pytest
import torch
from torch import nn

from moe.config import ModelConfig, OptimConfig
from moe.model import Transformer
from moe.optim import build_optimizer

FULL = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, q_lora_rank=6,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1, num_nextn_predict_layers=1,
    attention_bias=True,
)  # fmt: skip
GROUPED = FULL.replace(
    attention="gqa", num_attention_heads=4, num_key_value_heads=2, qk_norm="head", tie_word_embeddings=True,
    num_nextn_predict_layers=0,
)  # fmt: skip

# what a part of the model does under Muon, and whether it decays under either optimizer
ATTENTION = {
    "q_a_proj.weight": "muon", "q_a_proj.bias": "kept", "q_a_layernorm.weight": "kept", "q_b_proj.weight": "muon",
    "kv_a_proj_with_mqa.weight": "muon", "kv_a_proj_with_mqa.bias": "kept", "kv_a_layernorm.weight": "kept",
    "kv_b_proj.weight": "muon", "o_proj.weight": "muon", "o_proj.bias": "kept",
}  # fmt: skip
GROUPED_ATTENTION = {
    "q_proj.weight": "muon", "q_proj.bias": "kept", "k_proj.weight": "muon", "k_proj.bias": "kept",
    "v_proj.weight": "muon", "v_proj.bias": "kept", "o_proj.weight": "muon", "o_proj.bias": "kept",
    "q_norm.weight": "kept", "k_norm.weight": "kept",
}  # fmt: skip
DENSE = {"gate_proj.weight": "muon", "up_proj.weight": "muon", "down_proj.weight": "muon"}
MIXTURE = {
    "router.weight": "kept", "experts.gate_up_proj": "gate_up", "experts.down_proj": "down",
    **{f"shared_experts.{name}": what for name, what in DENSE.items()},
}  # fmt: skip
PREDICTOR = {"enorm.weight": "kept", "hnorm.weight": "kept", "eh_proj.weight": "muon", "norm.weight": "kept"}


def _layer(prefix: str, attention: dict[str, str], mlp: dict[str, str]) -> dict[str, str]:
    norms = {"input_layernorm.weight": "kept", "post_attention_layernorm.weight": "kept"}
    inside = {f"self_attn.{n}": w for n, w in attention.items()} | {f"mlp.{n}": w for n, w in mlp.items()}
    return {f"{prefix}.{name}": what for name, what in (norms | inside).items()}


WANTED = {
    "latent attention, mixture, multi-token prediction": (
        FULL,
        {"embed_tokens.weight": "kept", "norm.weight": "kept", "lm_head.weight": "decayed"}
        | _layer("layers.0", ATTENTION, DENSE)
        | _layer("layers.1", ATTENTION, MIXTURE)
        | {f"mtp.0.{name}": what for name, what in PREDICTOR.items()}
        | _layer("mtp.0.layer", ATTENTION, MIXTURE),
    ),
    "grouped queries, head tied to the embedding": (
        GROUPED,
        {"embed_tokens.weight": "kept", "norm.weight": "kept"}
        | _layer("layers.0", GROUPED_ATTENTION, DENSE)
        | _layer("layers.1", GROUPED_ATTENTION, MIXTURE),
    ),
}


def _treatment(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> str:
    (group,) = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    if group.get("part", "adamw") == "adamw":
        return "decayed" if group["weight_decay"] == 0.1 else "kept" if group["weight_decay"] == 0 else "?"
    assert group["weight_decay"] == 0.1
    return "muon" if group["part"] == "muon" else {2: "gate_up", 1: "down"}[group["matrices"]]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("case", WANTED, ids=lambda case: case)
def test_every_parameter_is_treated_as_listed(case: str, name: str) -> None:
    """Muon has hidden matrices and experts; AdamW decays the head and keeps norms, biases, embedding and routers."""
    config, wanted = WANTED[case]
    model = Transformer(config)
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1))
    if name == "adamw":
        wanted = {parameter: "kept" if what == "kept" else "decayed" for parameter, what in wanted.items()}
    assert {n: _treatment(optimizer, parameter) for n, parameter in model.named_parameters()} == wanted
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(wanted)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_leaves_the_selection_bias_alone(name: str) -> None:
    """Weight decay would pull a parameter to zero; the bias stays where the balancer put it."""
    model = Transformer(FULL)
    router = model.layers[1].mlp.router
    router.expert_bias.fill_(2.0)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    ids = torch.randint(61, (2, 8))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(router.expert_bias, torch.full((6,), 2.0))


def test_a_dense_model_has_no_experts_to_stack() -> None:
    """The dense twin of a mixture trains with Muon too."""
    optimizer = build_optimizer(Transformer(FULL.dense_twin()), OptimConfig(name="muon"))
    assert {group["part"] for group in optimizer.param_groups} == {"adamw", "muon"}
