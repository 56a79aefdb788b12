"""Which parameters decay, and that selection biases are unknown to the optimizer."""

import torch

from moe.config import ModelConfig, OptimConfig
from moe.model import Transformer
from moe.optim import build_optimizer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, q_lora_rank=6,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1, num_nextn_predict_layers=1,
    attention_bias=True,
)  # fmt: skip


def test_groups_hold_every_parameter_once_and_no_bias_of_selection() -> None:
    """Matrices and stacked experts decay; norms, biases, the embedding and routers do not; expert_bias is in none."""
    model = Transformer(CONFIG)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert set(decay) == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        kept = parameter.dim() == 1 or name.endswith(("router.weight", "embed_tokens.weight"))
        assert decay[id(parameter)] == (0.0 if kept else 0.1), name
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    assert len(biases) == 2
    assert not {id(buffer) for buffer in biases} & set(decay)


def test_a_step_without_gradients_leaves_biases_alone() -> None:
    """Weight decay would pull a parameter to zero; the bias stays where the balancer put it."""
    model = Transformer(CONFIG)
    router = model.layers[1].mlp.router
    router.expert_bias.fill_(2.0)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    ids = torch.randint(61, (2, 8))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(router.expert_bias, torch.full((6,), 2.0))
