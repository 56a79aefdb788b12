"""A run of seconds for the trainer's tests: a few thousand parameters on a text file the fixture writes."""

from moe.config import BalanceConfig, DataConfig, ModelConfig, OptimConfig, Recipe, RunConfig, TrainConfig
from moe.trainer import main

RECIPE = Recipe(
    run=RunConfig(name="tiny"),
    data=DataConfig(source="text", validation_fraction=0.1),
    model=ModelConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=8,
    ),
    train=TrainConfig(
        max_steps=40, global_batch_size=4, seq_len=32, eval_every_tokens=1280, checkpoint_every_steps=10,
        eval_sequences=6,
    ),
    optim=OptimConfig(lr=3e-3, warmup_steps=5),
    balance=BalanceConfig(bias_update_speed=0.01),
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
