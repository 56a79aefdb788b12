"""The training benchmark at tiny size: losses must agree, and its lines hold what they promise."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe import ModelConfig

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"
TINY = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; it sets the number of threads."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("bench_cpu_train")
    torch.set_num_threads(threads)


def test_prints_one_json_object_a_line(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case in turn; a ratio above 1 is ours being better, and a configuration says what was compared."""
    bench.main(["--rounds", "2"], TINY, 2, 16)
    lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(lines) == [
        "fp32", "fp32-alike", "fp32-shipped", "fastest", "fastest-alike", "fastest-shipped", "dense/fp32", "dense/bf16",
        "meter",
    ]  # fmt: skip
    keys = {"bench", "case", "ours", "peer", "peer_name", "unit", "ratio", "floor_fraction", "hardware", "config"}
    for case, line in lines.items():
        assert set(line) == keys
        better = line["ours"] / line["peer"] if line["unit"] == "tokens per s" else line["peer"] / line["ours"]
        assert line["ratio"] == pytest.approx(better)
        assert line["config"]["n_routed_experts"] == 4
        assert line["config"]["rounds"] == 2
        assert (line["floor_fraction"] is None) == (case == "meter")
    fastest = lines["fastest"]["config"]
    times = fastest["all_ms"]
    assert times[f"ours {fastest['ours_precision']}"] == min(times["ours fp32"], times["ours bf16"])
    assert {"attention", "router", "experts", "head and loss", "AdamW"} <= set(fastest["parts_ms"])
    for precision in ("fp32", "bf16"):
        dense = lines[f"dense/{precision}"]["config"]
        assert dense["routed_layer_ratio"] == pytest.approx(dense["dense_layer_ms"] / dense["routed_layer_ms"])
    assert lines["meter"]["config"]["energy_source"]


@pytest.mark.parametrize("loss", [9.0001, 8.9, float("nan")])
def test_times_nothing_when_losses_differ(bench: ModuleType, loss: float) -> None:
    """A peer that computes something else is no peer; a dense twin need not agree."""
    bench.check({"ours fp32": 9.0, "theirs fp32": 9.00001, "theirs pure bf16": 9.02, "dense fp32": 8.0})
    with pytest.raises(SystemExit, match="theirs fp32 and ours differ"):
        bench.check({"ours fp32": 9.0, "theirs fp32": loss})
