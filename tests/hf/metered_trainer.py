"""A transformers.Trainer on a model of a few thousand parameters; as a script, metered on every rank it is launched on.

torchrun --nproc-per-node 2 metered_trainer.py FOLDER STEPS [CHECKPOINT]     each rank prints what it did
"""

import sys
from pathlib import Path

import torch
import transformers

import moe.hf

__all__ = ["trainer"]


def trainer(folder: Path, steps: int, **options: object) -> transformers.Trainer:
    """One that trains on 4 sequences of 8 tokens a step and rank, evaluates and saves every third step."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.randint(32, (64, 8))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, logging_steps=2, save_steps=3,
        eval_strategy="steps", eval_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        include_num_input_tokens_seen="all", **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=transformers.LlamaForCausalLM(config), args=args, train_dataset=rows, eval_dataset=rows[:8]
    )


def main(folder: Path, steps: int, checkpoint: str | None = None) -> None:
    metered, callback = trainer(folder, steps), moe.hf.EnergyCallback(declared_power_w=100, interval_s=0.01)
    callback.add_to(metered)
    metered.train(resume_from_checkpoint=checkpoint)
    hours = metered.state.log_history[-1].get("train/device_hours")
    print(f"rank {metered.args.process_index} read {callback.meter is not None} hours {hours}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
