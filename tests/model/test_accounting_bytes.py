"""Bytes by arithmetic against bytes allocated: one real training step, and the decoding cache."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.accounting import cache_bytes_per_token, memory
from moe.balancer import find_routers
from moe.cache import Cache
from moe.config import ModelConfig, OptimConfig
from moe.layers.experts import multiply_in_fp8
from moe.model import Transformer
from moe.optim import build_optimizer

MLA = ModelConfig(
    vocab_size=211, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, n_shared_experts=2,
    num_experts_per_tok=3, moe_intermediate_size=24, first_k_dense_replace=1,
)  # fmt: skip
LOW_RANK = MLA.replace(q_lora_rank=20, attention_bias=True, v_head_dim=16)  # values as wide as queries
GQA = MLA.replace(attention="gqa", num_key_value_heads=2, head_dim=16, qk_norm="head", n_shared_experts=0)
OLMOE = GQA.replace(num_key_value_heads=None, qk_norm="full", clip_qkv=4.0, topk_method="greedy", score_func="softmax")
DENSE = GQA.replace(qk_norm="none").dense_twin()
TWO_AHEAD = MLA.replace(num_nextn_predict_layers=2)

# configuration, sequences, their length, precision, recomputed layers
CASES: dict[str, tuple[ModelConfig, int, int, Literal["fp32", "bf16", "fp8"], int]] = {
    "latent": (MLA, 2, 64, "fp32", 0),
    "latent, bf16": (MLA, 3, 40, "bf16", 0),
    "latent, fp8": (MLA, 3, 40, "fp8", 0),
    "latent, one sequence": (MLA, 1, 128, "fp32", 0),
    "latent, low-rank queries": (LOW_RANK, 2, 64, "fp32", 0),
    "latent, low-rank queries, bf16": (LOW_RANK, 4, 32, "bf16", 0),
    "latent, values wider than queries": (MLA.replace(v_head_dim=24), 2, 64, "fp32", 0),
    "latent, values wider than queries, bf16": (MLA.replace(v_head_dim=24), 2, 64, "bf16", 0),
    "null experts": (MLA.replace(n_null_experts=4), 2, 64, "fp32", 0),
    "null experts, bf16, recomputed": (MLA.replace(n_null_experts=4), 2, 64, "bf16", 2),
    "grouped": (GQA, 2, 64, "fp32", 0),
    "grouped, bf16": (GQA, 1, 200, "bf16", 0),
    "grouped, full norms, clamped": (OLMOE, 2, 64, "fp32", 0),
    "grouped, full norms, clamped, bf16": (OLMOE, 2, 64, "bf16", 0),
    "grouped, shared experts, bf16": (GQA.replace(n_shared_experts=1), 2, 64, "bf16", 0),
    "dense": (DENSE, 3, 50, "fp32", 0),
    "dense, bf16": (DENSE, 3, 50, "bf16", 0),
    "dense latent": (MLA.dense_twin(), 2, 64, "fp32", 0),
    "tied": (MLA.replace(tie_word_embeddings=True), 2, 64, "fp32", 0),
    "two ahead": (TWO_AHEAD, 2, 64, "fp32", 0),
    "two ahead, bf16": (TWO_AHEAD, 2, 64, "bf16", 0),
    "one ahead of a dense model, bf16": (DENSE.replace(num_nextn_predict_layers=1), 2, 64, "bf16", 0),
    "null experts, fp8, recomputed": (MLA.replace(n_null_experts=4), 2, 64, "fp8", 2),
    "two of three layers recomputed": (MLA, 2, 64, "fp32", 2),
    "all layers recomputed": (GQA, 2, 64, "fp32", 3),
    "all layers recomputed, bf16": (LOW_RANK, 2, 64, "bf16", 3),
    "one module recomputed too": (TWO_AHEAD, 2, 64, "fp32", 4),
    "both modules recomputed too, bf16": (TWO_AHEAD, 2, 64, "bf16", 5),
    "all but the modules recomputed, bf16": (TWO_AHEAD.replace(v_head_dim=16), 2, 64, "bf16", 3),
}


class Storages(TorchDispatchMode):
    """Remembers every storage made while it is on, without keeping any alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self._made[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        return out

    def alive(self, but: Iterable[Tensor]) -> int:
        """Bytes still allocated, of storages other than those of `but`."""
        others = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(size for key, (storage, size) in self._made.items() if not storage.expired() and key not in others)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _model(config: ModelConfig, precision: str) -> Transformer:
    model = Transformer(config)
    if precision == "fp8":
        assert multiply_in_fp8(model) == config.num_hidden_layers - config.first_k_dense_replace
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_step_holds_what_the_arithmetic_says(name: str) -> None:
    """Weights, gradients, moments and what a forward pass leaves behind for the backward pass, to 1 %.

    Activations are all tensors the forward pass made that are still there when only the loss is held, and the token
    ids. That sees what hooks on saved tensors do not: what recomputed layers keep in Python. AdamW's step counters, one
    number a tensor, are left out.
    """
    config, sequences, length, precision, recomputed = CASES[name]
    wanted = memory(
        config, micro_batch_size=sequences, seq_len=length, precision=precision, recompute_layers=recomputed
    )
    model = _model(config, precision)
    model.recompute(recomputed)
    optimizer = build_optimizer(model, OptimConfig())
    ids = torch.randint(config.vocab_size, (sequences, length))
    own = [*model.parameters(), *model.buffers()]
    with Storages() as made, torch.autocast("cpu", torch.bfloat16) if precision != "fp32" else nullcontext():
        out = model(ids, labels=ids)
        loss = out.loss if out.mtp_loss is None else out.loss + out.mtp_loss
    del out
    for router in find_routers(model).values():
        router.forget()  # type: ignore[operator]
    kept = made.alive(but=[*own, ids, loss]) + _bytes([ids])
    loss.backward()
    optimizer.step()

    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert wanted["weights"] == _bytes(own)
    assert wanted["gradients"] == _bytes(
        parameter.grad for parameter in model.parameters() if parameter.grad is not None
    )
    assert wanted["optimizer"] == _bytes(moments)
    assert wanted["activations"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("name", CASES)
def test_muon_keeps_one_momentum_of_its_matrices(name: str) -> None:
    """Exactly: two moments for what AdamW trains beside it, one for each matrix Muon takes."""
    config, sequences, length, *_ = CASES[name]
    model = Transformer(config)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    wanted = memory(config, micro_batch_size=sequences, seq_len=length, optimizer="muon")
    assert wanted["optimizer"] == _bytes(kept)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[-1] == 0])
def test_hooks_on_saved_tensors_see_the_same(name: str) -> None:
    """Unique storages that autograd saves, other than parameters and buffers: another way to measure, where it can."""
    config, sequences, length, precision, _ = CASES[name]
    model = _model(config, precision)
    ids = torch.randint(config.vocab_size, (sequences, length))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if precision != "fp32" else nullcontext(),
    ):
        model(ids, labels=ids)
    kept = _bytes(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own)
    wanted = memory(config, micro_batch_size=sequences, seq_len=length, precision=precision)
    assert wanted["activations"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("config", [MLA, GQA, OLMOE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_holds_what_the_arithmetic_says(config: ModelConfig, dtype: torch.dtype) -> None:
    """The storage of a real cache, by token and sequence."""
    cache = Cache(config, 3, 10, dtype=dtype)
    assert cache.layer(0).store.untyped_storage().nbytes() == 3 * 10 * cache_bytes_per_token(config, dtype.itemsize)
