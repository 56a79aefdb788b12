"""Layers and the model outside the trainer: compiled, checkpointed, in nn.Sequential, the same as alone."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from moe import Balancer, ModelConfig, Transformer, layers
from moe.balancer import find_routers
from moe.errors import ConfigError
from moe.layers import (
    DecoderLayer,
    Experts,
    FeedForward,
    GroupedQueryAttention,
    MoE,
    MultiHeadLatentAttention,
    MultiTokenPredictor,
    OutputHead,
    RMSNorm,
    Router,
)
from moe.layers.head import next_token_labels

D = 24
CONFIG = ModelConfig(
    vocab_size=61, hidden_size=D, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1, num_nextn_predict_layers=1,
    initializer_range=0.2,
)  # fmt: skip
Inputs = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Graphs of other tests count towards torch.compile's limit of graphs for one piece of code."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 9)), D, requires_grad=True)


def _routed() -> Inputs:
    index = torch.stack([torch.randperm(6)[:2] for _ in range(18)])
    return _x(18), index, torch.rand(18, 2, requires_grad=True), torch.bincount(index.flatten(), minlength=6).int()


def _uneven_norm() -> RMSNorm:
    """With weights of 1 the sum of squares would not depend on the input: its gradient would be rounding alone."""
    norm = RMSNorm(D)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


# name -> (the layer, its inputs)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "moe": (lambda: MoE(D, 6, 2, 12, 1), lambda: (_x(),)),
    "moe, padded": (lambda: MoE(D, 6, 2, 12, 1), lambda: (_x(), torch.rand(2, 9) > 0.3)),
    "moe, groups": (
        lambda: MoE(D, 8, 2, 12, 2, n_group=4, topk_group=2, norm_topk_prob=False, routed_scaling_factor=2.5),
        lambda: (_x(),),
    ),
    "moe, softmax": (lambda: MoE(D, 6, 3, 12, score_func="softmax", topk_method="greedy"), lambda: (_x(),)),
    "moe, group-limited": (
        lambda: MoE(D, 6, 2, 12, score_func="softmax", topk_method="group_limited_greedy", n_group=3, topk_group=2),
        lambda: (_x(),),
    ),
    "mla": (lambda: MultiHeadLatentAttention(D, 3, 8, 8, 4, 8, q_lora_rank=6), lambda: (_x(),)),
    "gqa": (lambda: GroupedQueryAttention(D, 4, 2, qk_norm="head"), lambda: (_x(),)),
    "feed-forward": (lambda: FeedForward(D, 40), lambda: (_x(),)),
    "norm": (_uneven_norm, lambda: (_x(),)),
    "router": (lambda: Router(D, 6, 2), lambda: (_x(18),)),
    "experts": (lambda: Experts(D, 12, 6), _routed),
    "head": (lambda: OutputHead(D, 61), lambda: (_x(),)),
    "head, loss": (lambda: OutputHead(D, 61), lambda: (_x(), torch.randint(61, (2, 9)))),
    "predictor": (lambda: MultiTokenPredictor(CONFIG, 1), lambda: (_x(), _x())),
    "decoder, dense": (lambda: DecoderLayer(CONFIG, 0), lambda: (_x(),)),
    "decoder, routed": (lambda: DecoderLayer(CONFIG, 1), lambda: (_x(),)),
}


def test_every_public_layer_is_here() -> None:
    """A layer that becomes public gets its case."""
    assert {type(make()).__name__ for make, _ in CASES.values()} == set(layers.__all__)


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def _run(layer: nn.Module, inputs: Inputs, call: Callable[..., Any]) -> dict[str, Tensor]:
    """Outputs of a forward, gradients of a backward, and what routers counted meanwhile."""
    leaves = tuple(part.detach().clone().requires_grad_(part.requires_grad) for part in inputs)
    outputs = _tensors(call(*leaves))
    found = {f"output {number}": part.detach() for number, part in enumerate(outputs)}
    sum((part.square().sum() for part in outputs if part.requires_grad), torch.zeros(())).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    gradients |= {f"input {number}": part.grad for number, part in enumerate(leaves) if part.requires_grad}
    found |= {f"gradient of {name}": grad for name, grad in gradients.items() if grad is not None}
    for name, router in find_routers(layer).items():
        assert isinstance(router.tokens_per_expert, Tensor)
        found[f"load of {name}"] = router.tokens_per_expert
    return found


def _assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], within: float | None = None) -> None:
    """By torch's own tolerances, or `within` a part of each tensor's largest entry; 0 is bit by bit."""
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        some = {} if within is None else {"atol": within * float(want.abs().max()), "rtol": 0.0}
        torch.testing.assert_close(found[name], want, **some, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    """One graph, without a break: outputs, gradients and loads of the eager layer; under autocast too."""
    make, inputs_of = CASES[case]
    torch.manual_seed(0)
    layer, inputs = make(), inputs_of()
    again = copy.deepcopy(layer)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found, wanted = _run(again, inputs, compiled), _run(layer, inputs, layer)
        assert any(name.startswith("gradient") for name in wanted)
        _assert_same(found, wanted, within=0.05 if mixed else None)  # bf16 has three digits, and sums cancel


@pytest.mark.parametrize("case", ["mla", "gqa"])
def test_attention_over_any_length_is_one_graph(case: str) -> None:
    """A length that the compiler does not know asks for no decision in Python."""
    torch.manual_seed(0)
    layer = CASES[case][0]()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (10, 13):
            x = torch.randn(2, length, D)
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_checkpointed(case: str, reentrant: bool) -> None:
    """Either kind of activation checkpointing: the same bit by bit, and loads counted once."""
    make, inputs_of = CASES[case]
    torch.manual_seed(0)
    layer, inputs = make(), inputs_of()
    again = copy.deepcopy(layer)
    found = _run(again, inputs, lambda *parts: checkpoint(again, *parts, use_reentrant=reentrant))
    _assert_same(found, _run(layer, inputs, layer), within=0.0)


def _stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(61, D),
        GroupedQueryAttention(D, 4, 2),
        MoE(D, 6, 2, 12),
        RMSNorm(D),
        MultiHeadLatentAttention(D, 3, 8, 8, 4, 8),
        MoE(D, 6, 2, 12, 1),
        DecoderLayer(CONFIG, 1),
        OutputHead(D, 61),
    )


def _losses(model: nn.Sequential, call: Callable[[Tensor], Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    balancer = Balancer(model, bias_update_speed=0.01)
    ids = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(call(ids).flatten(0, 1), next_token_labels(ids).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        load = balancer.step()
        assert {int(counts.sum()) for counts in load.tokens_per_expert.values()} == {64 * 2}
        losses.append(loss.item())
    return losses


def test_in_a_sequential() -> None:
    """A plain stack of layers learns, and the balancer moves the biases of every router in it."""
    model = _stack()
    losses = _losses(model, model, 20)
    assert losses[-1] < 0.9 * losses[0]
    routers = find_routers(model)
    assert list(routers) == ["2.router", "5.router", "6.mlp.router"]
    for router in routers.values():
        assert isinstance(router.expert_bias, Tensor)
        assert router.expert_bias.abs().max() > 0.005


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_sequential(reentrant: bool) -> None:
    """torch's own way of checkpointing a stack: the same losses and biases, step by step."""
    plain, stack = _stack(), _stack()
    wanted = _losses(plain, plain, 3)

    def call(ids: Tensor) -> Tensor:
        return checkpoint_sequential(stack[1:], 3, stack[0](ids), use_reentrant=reentrant)

    assert _losses(stack, call, 3) == wanted
    for one, other in zip(find_routers(plain).values(), find_routers(stack).values(), strict=True):
        assert torch.equal(one.expert_bias, other.expert_bias)  # type: ignore[arg-type]


def _train(model: Transformer, call: Callable[..., Any], steps: int) -> list[dict[str, Tensor]]:
    """Per step losses, gradients, loads and biases, over two micro-batches each, one of them with padding."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = Balancer(model, bias_update_speed=0.01, sequence_loss_alpha=0.01)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(steps):
        row: dict[str, Tensor] = {}
        for micro in range(2):
            ids = torch.randint(61, (2, 12), generator=generator)
            documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12]) if micro else None
            labels = ids if documents is None else ids.masked_fill(documents < 0, -100)
            out = call(ids, labels=labels, document_ids=documents)
            (out.loss + 0.3 * out.mtp_loss + out.balance_loss).backward()
            row |= {f"loss {micro}": out.loss.detach(), f"mtp_loss {micro}": out.mtp_loss.detach()}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            row[f"gradient of {name}"] = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        row |= {f"load of {name}": counts for name, counts in balancer.step().tokens_per_expert.items()}
        row |= {f"bias of {name}": r.expert_bias.clone() for name, r in find_routers(model).items()}  # type: ignore
        rows.append(row)
    return rows


def _transformer(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG.replace(**changes))


def test_a_compiled_model_trains_as_an_eager_one() -> None:
    """Losses, every gradient, loads and biases over steps of two micro-batches; and no more than two graphs for it.

    The second is for a router that has counted a micro-batch already.
    """
    from torch._dynamo.utils import counters

    eager, traced = _transformer(), _transformer()
    wanted = _train(eager, eager, 3)
    counters.clear()
    found = _train(traced, torch.compile(traced, fullgraph=True, backend="aot_eager"), 3)
    assert counters["stats"]["unique_graphs"] == 2
    for one, other in zip(found, wanted, strict=True):
        assert any(name.startswith("load of mtp") for name in other)
        _assert_same(one, other)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's import
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's own backend, which generates code: the same numbers from a small model."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    changes = dict(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    eager, traced = _transformer(**changes), _transformer(**changes)
    # one thread: a pool of workers would outlive the test
    compiled = torch.compile(traced, fullgraph=True, options={"compile_threads": 1})
    ids = torch.randint(61, (2, 12))
    loads = []
    for model, call in ((eager, eager), (traced, compiled)):
        balancer = Balancer(model)
        call(ids, labels=ids).loss.backward()
        loads.append(balancer.step().tokens_per_expert["layers.0.mlp.router"])
    assert torch.equal(*loads)
    for (name, one), other in zip(eager.named_parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_checkpointed_model() -> None:
    """The whole forward in one region, as FSDP wrappers do it: the same loss, gradients and loads bit by bit."""
    eager, again = _transformer(), _transformer()

    def call(ids: Tensor, **inputs: Any) -> Any:
        def losses() -> Any:
            out = again(ids, **inputs)
            return out.loss, out.mtp_loss, out.balance_loss

        loss, mtp_loss, balance_loss = checkpoint(losses, use_reentrant=False)
        return type("Out", (), dict(loss=loss, mtp_loss=mtp_loss, balance_loss=balance_loss))

    for one, other in zip(_train(again, call, 2), _train(eager, eager, 2), strict=True):
        _assert_same(one, other, within=0.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GroupedQueryAttention(24, 4, 3), "num_key_value_heads=3 must divide num_attention_heads (4)"),
        (lambda: GroupedQueryAttention(25, 4), "hidden_size=25 must be divisible by num_attention_heads (4)"),
        (lambda: GroupedQueryAttention(24, 8), "head_dim=3 must be even"),
        (lambda: GroupedQueryAttention(24, 4, qk_norm="all"), "qk_norm='all' must be none, head or full"),  # type: ignore
        (lambda: MultiHeadLatentAttention(24, 3, 8, 8, 3, 8), "qk_rope_head_dim=3 must be even"),
        (lambda: MoE(24, 4, 5, 8), "num_experts_per_tok=5 must be between 1 and n_routed_experts (4)"),
        (lambda: MoE(24, 4, 2, 8, n_group=3), "n_group=3 must divide n_routed_experts (4)"),
    ],
)
def test_arguments_that_do_not_fit(make: Callable[[], nn.Module], sentence: str) -> None:
    """Said when the layer is made, in one sentence, not by a shape error later."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
