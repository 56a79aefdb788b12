"""The dtype that enters each matrix product of a real training run, and what stays fp32 whatever `train.precision`.

torch's profiler records every product that a kernel is asked for, inside our own ops and in the backward pass too, with
its inputs' dtypes and shapes. Of a product that asks for another one (autocast does) the inner one counts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from moe.config import ModelConfig, OptimConfig, Recipe, RunConfig, TrainConfig
from moe.config.data import DataConfig
from moe.trainer import train

PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::mv", "aten::addmv", "aten::dot",
    "aten::_grouped_mm", "aten::_scaled_mm", "aten::convolution",
}  # fmt: skip
SEQUENCES, LENGTH, HIDDEN, EXPERTS = 4, 32, 16, 5
# tokens a router may score at once: whole sequences, for multi-token prediction without their last token
SCORED = {number * length for number in range(1, SEQUENCES + 1) for length in (LENGTH - 1, LENGTH)}


def _recipe(folder: Path, precision: str, attention: str, optimizer: str) -> Recipe:
    return Recipe(
        run=RunConfig(name=f"{precision}-{attention}-{optimizer}", directory=str(folder / "runs")),
        data=DataConfig(source=str(folder / "text"), validation_fraction=0.1),
        model=ModelConfig(
            vocab_size=300, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            attention=attention, q_lora_rank=6 if attention == "mla" else None, kv_lora_rank=8, qk_nope_head_dim=8,
            qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, n_routed_experts=EXPERTS, n_shared_experts=1,
            num_experts_per_tok=2, moe_intermediate_size=8, num_nextn_predict_layers=1, attention_bias=True,
        ),
        train=TrainConfig(
            max_steps=1, global_batch_size=SEQUENCES, seq_len=LENGTH, precision=precision, eval_sequences=2
        ),
        optim=OptimConfig(name=optimizer),
    )  # fmt: skip


class Product(NamedTuple):
    """What entered it, and the three sizes of a two-dimensional one."""

    name: str
    dtypes: frozenset[str]
    sizes: frozenset[int]

    @property
    def is_routing(self) -> bool:
        """Scores, or their gradient by tokens or by the router's weight: sizes tokens, width and experts."""
        return {HIDDEN, EXPERTS} < self.sizes and bool(self.sizes & SCORED)


def _products(trace: Path) -> Iterator[Product]:
    """Every innermost product in a profiler's trace."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "cpu_op"]
    asked = [e for e in events if e["name"] in PRODUCTS or e["name"].startswith("aten::_scaled_dot_product")]
    asked.sort(key=lambda event: (event["tid"], event["ts"]))
    for event, following in zip(asked, [*asked[1:], None], strict=True):
        if following and following["tid"] == event["tid"] and following["ts"] < event["ts"] + event["dur"]:
            continue
        arguments = list(zip(event["args"]["Input type"], event["args"]["Input Dims"], strict=True))
        least = 4 if "scaled_dot_product" in event["name"] else 2  # a bias has less, and attention's fp32 logsumexp
        operands = [(kind, shape) for kind, shape in arguments if len(shape) >= least]
        sizes = {size for _, shape in operands for size in shape if len(shape) == 2}
        yield Product(event["name"], frozenset(kind for kind, _ in operands), frozenset(sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("precision")
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 14, (40_000,), generator=generator).tolist()
    (place / "text").write_text("".join("etaoinshrdlu  "[letter] for letter in letters))
    return place


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_product_has_the_recipes_dtype(folder: Path, precision: str, attention: str) -> None:
    """fp32: all of them. bf16: all but the router's scores and their gradients, told by their width, the experts."""
    trace = folder / f"{precision}-{attention}.json"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        train(_recipe(folder, precision, attention, "adamw"))
    profiler.export_chrome_trace(str(trace))
    products = list(_products(trace))
    routing = [product for product in products if product.is_routing]
    # norms are in fp32 whatever the products are in; a matrix by a vector is a norm's sum over a row, and a vector by
    # itself the norm of the gradient
    norms = {product.dtypes for product in products if product.name == "aten::mv"}
    assert norms == {frozenset({"float"})}
    others = {(p.name, *p.dtypes) for p in products if not p.is_routing and p.name not in ("aten::mv", "aten::dot")}
    assert len(routing) >= 2 + 2 * 3  # two evaluations; in the step two routers with two gradients each
    assert {product.dtypes for product in routing} == {frozenset({"float"})}
    wanted = {"fp32": "float", "bf16": "c10::BFloat16"}[precision]
    assert others == {(name, wanted) for name, *_ in others}
    scores = {"mla": "aten::baddbmm", "gqa": "aten::_scaled_dot_product_flash_attention_for_cpu_backward"}[attention]
    assert {"aten::mm", scores} <= {name for name, *_ in others}


def test_what_is_kept_is_fp32(folder: Path) -> None:
    """Under bf16: master weights, expert biases, AdamW's moments and Muon's momentum, as the checkpoint has them."""
    recipe = _recipe(folder, "bf16", "mla", "muon")
    train(recipe)
    (checkpoint,) = (folder / "runs" / recipe.run.name / "checkpoints").iterdir()
    kept = load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    fields = {name.rpartition("/")[2] for name in kept if "/" in name}
    assert fields == {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"}
    assert sum(name.endswith("expert_bias") for name in kept) == 2
