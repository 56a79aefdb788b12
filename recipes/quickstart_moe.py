"""A small DeepSeek-V3-style mixture of experts on Python's standard library: minutes on two processor cores.

accelerate launch recipes/quickstart_moe.py [section.field=value …]
"""

from moe.config import BalanceConfig, ModelConfig, OptimConfig, Recipe, RunConfig, TrainConfig
from moe.trainer import main

RECIPE = Recipe(
    run=RunConfig(name="quickstart_moe"),
    model=ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=384,
        first_k_dense_replace=1,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=3,
        moe_intermediate_size=96,
    ),
    train=TrainConfig(
        max_steps=400, global_batch_size=8, seq_len=256, eval_every_tokens=100_000, checkpoint_every_steps=100
    ),
    optim=OptimConfig(lr=4e-3, warmup_steps=40),
    # as DeepSeek-V3 balances, both numbers larger for a run of some hundred steps; measured in docs/balancing.md
    balance=BalanceConfig(method="sign", bias_update_speed=0.002, sequence_loss_alpha=0.01),
)

if __name__ == "__main__":
    main(RECIPE)
