"""`moe generate`: text from a run directory, and one sentence where there is none."""

import subprocess
import sys
from pathlib import Path

import torch

from moe.checkpoint import capture, write_checkpoint
from moe.config import ModelConfig, OptimConfig, Recipe, RunConfig
from moe.data.tokenizer import train_tokenizer
from moe.model import Transformer
from moe.optim import build_optimizer
from moe.rundir import RunDir, write_json


def _moe(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moe.cli", *words], capture_output=True, text=True, timeout=120)


def test_a_run_continues_a_prompt(tmp_path: Path) -> None:
    """The newest checkpoint speaks; the same seed says the same; a damaged checkpoint is passed over and named."""
    (tmp_path / "text").write_text("one two three four five six seven eight nine ten " * 40)
    config = ModelConfig(
        vocab_size=290, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    run = RunDir.named("talker", tmp_path)
    run.create()
    write_json(run.config, Recipe(run=RunConfig(name="talker"), model=config).to_dict())
    train_tokenizer([(tmp_path / "text").read_text()], 290, run.tokenizer)
    torch.manual_seed(0)
    model = Transformer(config)
    for step in (1, 2):
        snapshot = capture(model, build_optimizer(model, OptimConfig()), {"tokens": step}, copy=False)
        write_checkpoint(run.checkpoints, step, snapshot)
    words = ("generate", str(run.root), "one two", "--tokens", "8", "--temperature", "1", "--seed", "3")
    first, second = _moe(*words), _moe(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("one two")
    assert len(first.stdout) > len("one two\n")
    (run.checkpoints / "step_00000002" / "model.safetensors").write_bytes(b"")
    third = _moe(*words)
    assert third.stdout == first.stdout
    assert "passed over: " in third.stderr


def test_no_run_and_no_checkpoint_are_one_sentence(tmp_path: Path) -> None:
    """Exit code 2, no traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    for folder, sentence in ((tmp_path / "none", "is not a directory"), (tmp_path / "empty", "has no checkpoint yet")):
        done = _moe("generate", str(folder), "x")
        assert done.returncode == 2
        assert done.stderr.startswith("moe: ")
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
