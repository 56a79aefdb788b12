"""Recorded routes send tokens where they went before, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from moe import RouteRecorder, RouteReplay
from moe.balancer import Balancer, find_routers
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.layers import MoE
from moe.model import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1, num_nextn_predict_layers=1,
    initializer_range=0.3,
)  # fmt: skip
ROUTERS = ["layers.1.mlp.router", "layers.2.mlp.router", "mtp.0.layer.mlp.router"]


def _model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def _step(model: Transformer, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients over two micro-batches."""
    total = torch.zeros(())
    for part in ids.chunk(2):
        out = model(part, labels=part)
        (out.loss + out.mtp_loss).backward()
        total = total + out.loss.detach()
    return total, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _disturb(model: Transformer) -> None:
    """Biases that would send every token elsewhere."""
    with torch.no_grad():
        for router in find_routers(model).values():
            router.expert_bias.copy_(torch.arange(6.0))  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("recomputed", [0, 4])
def test_the_same_weights_give_the_same_bits(recomputed: int, tmp_path: Path) -> None:
    """Loss and gradients of a training step, although the biases have changed; with recomputed layers too."""
    ids = torch.randint(61, (4, 10))
    model = _model()
    model.recompute(recomputed)
    with RouteRecorder(model) as recorder:
        loss, grads = _step(model, ids)
    recorder.save(tmp_path / "routes.safetensors")
    assert {name: len(routes) for name, routes in recorder.routes.items()} == dict.fromkeys(ROUTERS, 2)
    again = _model()
    again.recompute(recomputed)
    _disturb(again)
    with RouteReplay(again, tmp_path / "routes.safetensors"):
        loss2, grads2 = _step(again, ids)
    assert torch.equal(loss, loss2)
    assert all(torch.equal(one, two) for one, two in zip(grads, grads2, strict=True))
    loads = Balancer(again).step().tokens_per_expert
    assert loads[ROUTERS[0]].tolist() == torch.cat(recorder.routes[ROUTERS[0]]).flatten().bincount(minlength=6).tolist()
    again.zero_grad()
    assert not torch.equal(_step(again, ids)[0], loss)  # and outside the block the biases are back in force


def test_other_weights_keep_the_choices(tmp_path: Path) -> None:
    """Reinforcement learning: the rollout's experts, with the trainer's scores, gradients reaching its router."""
    ids = torch.randint(61, (2, 10))
    rollout, trainer = _model().eval(), _model()
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    with RouteRecorder(rollout) as recorder, torch.no_grad():
        rollout(ids)
    recorder.save(tmp_path / "routes")
    with RouteReplay(trainer, tmp_path / "routes"), RouteRecorder(trainer) as seen:
        out = trainer(ids, labels=ids)  # with multi-token prediction, which a rollout has none of
        (out.loss + out.mtp_loss).backward()
    assert len(seen.routes[ROUTERS[2]]) == 1
    for name in ROUTERS[:2]:
        assert torch.equal(seen.routes[name][0], recorder.routes[name][0])
    gradient = find_routers(trainer)[ROUTERS[0]].weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0  # type: ignore[operator]


def test_a_rollout_token_by_token_is_one_forward_of_training(tmp_path: Path) -> None:
    """Prompt, then a token at a time over a cache: joined, the routes are those of the whole sequences."""
    model = _model()
    prompts = torch.randint(61, (2, 4))
    with RouteRecorder(model) as recorder:
        new = torch.tensor(model.generate(prompts.tolist(), 5))
    assert len(recorder.routes[ROUTERS[0]]) == 5
    recorder.join(2)
    recorder.save(tmp_path / "routes")
    whole = torch.cat((prompts, new[:, :-1]), dim=1)  # the last token was never passed on
    with RouteRecorder(model) as seen, torch.no_grad():
        model(whole)
    assert torch.equal(seen.routes[ROUTERS[0]][0], recorder.routes[ROUTERS[0]][0])
    _disturb(model)
    with RouteReplay(model, tmp_path / "routes"), RouteRecorder(model) as seen:
        model(whole, labels=whole).loss.backward()
    assert torch.equal(seen.routes[ROUTERS[0]][0], recorder.routes[ROUTERS[0]][0])
    with pytest.raises(ConfigError, match="sequences=3: forward 0 of"):
        recorder.join(3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_a_repeated_forward_takes_its_own_choices(reentrant: bool, together: bool, tmp_path: Path) -> None:
    """Two checkpointed forwards, with a backward pass after each or one after both: the gradients without replay."""
    torch.manual_seed(0)
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8)
    xs = [torch.randn(5, 16, requires_grad=True) for _ in range(2)]

    def run() -> list[torch.Tensor]:
        losses = [checkpoint(layer, x, use_reentrant=reentrant).square().sum() for x in xs[: 2 if together else 0]]
        if together:
            sum(losses).backward()  # type: ignore[union-attr]
        else:
            for x in xs:
                checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        grads = [x.grad for x in xs]
        for x in xs:
            x.grad = None
        return grads  # type: ignore[return-value]

    with RouteRecorder(layer) as recorder:
        wanted = run()
    recorder.save(tmp_path / "routes")
    with torch.no_grad():
        layer.router.expert_bias.copy_(torch.arange(8.0))  # type: ignore[union-attr]
    with RouteReplay(layer, tmp_path / "routes"):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_compiled_model_is_recorded_and_replayed_eagerly(tmp_path: Path) -> None:
    """Compiled before the block, it would be blind to the recorder; after the block it is compiled again."""
    model = _model().eval()
    ids = torch.randint(61, (2, 10))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = compiled(ids).hidden
    with RouteRecorder(model) as recorder:
        compiled(ids)
    assert len(recorder.routes[ROUTERS[0]]) == 1
    recorder.save(tmp_path / "routes")
    _disturb(model)
    with RouteReplay(model, tmp_path / "routes"):
        torch.testing.assert_close(compiled(ids).hidden, wanted, atol=1e-5, rtol=1e-5)
    assert (compiled(ids).hidden - wanted).abs().max() > 0.1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_takes_each_choice_once(reentrant: bool, tmp_path: Path) -> None:
    """Recomputation repeats the recorded forward instead of consuming the next."""
    torch.manual_seed(0)
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8)
    xs = [torch.randn(5, 16, requires_grad=True) for _ in range(2)]

    def run() -> None:
        for x in xs:
            checkpoint(layer, x, use_reentrant=reentrant).sum().backward()

    with RouteRecorder(layer) as recorder:
        run()
    assert len(recorder.routes["router"]) == 2
    recorder.save(tmp_path / "routes")
    with torch.no_grad():
        layer.router.expert_bias.copy_(torch.arange(8.0))  # type: ignore[union-attr]
    with RouteReplay(layer, tmp_path / "routes"), RouteRecorder(layer) as seen:
        run()
    assert all(torch.equal(a, b) for a, b in zip(recorder.routes["router"], seen.routes["router"], strict=True))


def test_the_file_is_small_and_says_what_it_is(tmp_path: Path) -> None:
    """One byte a choice up to 256 experts, two beyond."""
    for experts, dtype in ((256, torch.uint8), (257, torch.int16)):
        layer = MoE(16, experts, num_experts_per_tok=3, moe_intermediate_size=2)
        with RouteRecorder(layer) as recorder:
            layer(torch.randn(4, 5, 16))
        recorder.save(tmp_path / "routes")
        with safe_open(tmp_path / "routes", framework="pt") as file:
            assert file.metadata()["format"] == "frugal-moe routes"
            route = file.get_tensor("router/0")
        assert route.dtype == dtype
        assert route.shape == (20, 3)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    """Another file, another model, another batch, more forwards."""
    layer = MoE(16, 8, num_experts_per_tok=2, moe_intermediate_size=8)
    with pytest.raises(CheckpointError, match="cannot be read"):
        RouteReplay(layer, tmp_path / "nothing")
    save_file({"router/0": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is no recording of routes"):
        RouteReplay(layer, tmp_path / "other")
    with RouteRecorder(layer) as recorder:
        layer(torch.randn(5, 16))
    recorder.save(tmp_path / "routes")
    with pytest.raises(CheckpointError, match=r"has routes of 'router', which the model has not"):
        RouteReplay(_model(), tmp_path / "routes")
    save_file(
        {"router/x": torch.zeros(1)}, tmp_path / "foreign", metadata={"format": "frugal-moe routes", "version": "1"}
    )
    with pytest.raises(CheckpointError, match="cannot be read"):
        RouteReplay(layer, tmp_path / "foreign")
    with (
        RouteReplay(layer, tmp_path / "routes"),
        pytest.raises(ConfigError, match=r"is \(5, 2\), and this is \(6, 2\)"),
    ):
        layer(torch.randn(6, 16))
    with RouteReplay(layer, tmp_path / "routes"):
        layer(torch.randn(5, 16))
        with pytest.raises(ConfigError, match="holds 1 forwards of router, and this is one more"):
            layer(torch.randn(5, 16))
    assert layer.router.choices is None
