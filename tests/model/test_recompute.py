"""Recomputed layers: the same numbers bit for bit, less memory, and routing that is decided once."""

import pytest
import torch

from moe.balancer import Balancer, find_routers
from moe.config import ModelConfig
from moe.model import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip


def _step(layers: int, *, compiled: bool = False) -> tuple[Transformer, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.recompute(layers)
    balancer = Balancer(model, sequence_loss_alpha=0.01)
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(1))
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    out = forward(ids, labels=ids)
    (out.loss + out.mtp_loss + out.balance_loss).backward()
    return model, out.loss, balancer.step().tokens_per_expert


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_gradients_and_loads_are_bitwise_the_same(layers: int) -> None:
    """Of a dense layer, of routed ones and of a multi-token prediction module."""
    model, loss, load = _step(0)
    again, loss2, load2 = _step(layers)
    assert torch.equal(loss, loss2)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad), name
    assert all(torch.equal(load[name], load2[name]) for name in load)


def test_routing_is_not_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the second computation see other scores, the first one's choices and weights stand."""
    model = Transformer(CONFIG)
    model.recompute(3)
    ids = torch.randint(61, (2, 16))
    routes: list[torch.Tensor] = []
    router = find_routers(model)["layers.2.mlp.router"]
    router.register_forward_hook(lambda module, args, route: routes.append(route.topk_index_TK))
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        router.expert_bias.copy_(torch.arange(6.0))  # type: ignore[operator]
    loss.backward()
    assert len(routes) == 2  # the layer was computed twice
    assert torch.equal(routes[0], routes[1])
    assert router(torch.randn(4, 24)).topk_index_TK.min() >= 4  # while a new decision would choose the last two


def test_less_is_kept() -> None:
    """Bytes saved for the backward pass: a recomputed layer keeps its input and its routes."""

    def kept(layers: int) -> int:
        model = Transformer(CONFIG.replace(num_nextn_predict_layers=0))
        model.recompute(layers)
        ids = torch.randint(61, (4, 64))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, labels=ids)
        return sum(found.values())

    everything, two, three = kept(0), kept(2), kept(3)
    assert three < two < everything
    assert three < 0.35 * everything


def test_compiles_into_one_graph() -> None:
    """torch.compile understands the recomputation and what it keeps."""
    model, loss, load = _step(0)
    again, loss2, load2 = _step(4, compiled=True)
    torch.testing.assert_close(loss2, loss)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert all(torch.equal(load[name], load2[name]) for name in load)
