"""Multi-token prediction against the paper's formula, written out token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.balancer import Balancer, find_routers
from moe.config import ModelConfig
from moe.layers.rope import rotary_tables
from moe.model import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1, num_nextn_predict_layers=2,
    initializer_range=0.3,
)  # fmt: skip


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def _by_the_formula(model: Transformer, ids: Tensor) -> Tensor:
    """Mean over modules, one position and one prefix at a time: position i knows tokens 0 … i + k, no later ones."""
    losses = []
    sequence = ids[0]
    hidden = model(ids).hidden[0]
    for k, module in enumerate(model.mtp, start=1):
        inputs = []
        for i in range(len(sequence) - k):
            embedded = model.embed_tokens(sequence[i + k])
            inputs.append(module.eh_proj(torch.cat((module.enorm(embedded), module.hnorm(hidden[i])))))
        rows, terms = [], []
        for i in range(len(inputs)):
            positions = torch.arange(i + 1)[None]
            rotary = rotary_tables(positions, CONFIG.rotary_dim, CONFIG.rope_theta)
            rows.append(module.norm(module.layer(torch.stack(inputs[: i + 1])[None], rotary))[0, -1])
            if i + k + 1 < len(sequence):
                terms.append(F.cross_entropy(model.lm_head(rows[-1]), sequence[i + k + 1]))
        losses.append(torch.stack(terms).mean())
        hidden = torch.stack(rows)
    return torch.stack(losses).mean()


def test_loss_is_the_papers(model: Transformer) -> None:
    """Two modules on a sequence, value and gradients of every parameter; the model's own loss does not change."""
    ids = torch.randint(61, (1, 9))
    out = model(ids, labels=ids)
    wanted = _by_the_formula(model, ids)
    torch.testing.assert_close(out.mtp_loss, wanted, atol=1e-5, rtol=1e-5)
    without = Transformer(CONFIG.replace(num_nextn_predict_layers=0))
    without.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(out.loss, without(ids, labels=ids).loss)
    names = [name for name, _ in model.named_parameters()]
    mine = torch.autograd.grad(out.mtp_loss, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    for name, a, b in zip(names, mine, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_embedding_comes_first(model: Transformer) -> None:
    """The released checkpoints' order: the left half of eh_proj reads the embedding, the right half hidden states."""
    ids = torch.randint(61, (1, 9))
    module = model.mtp[0]
    with torch.no_grad():
        module.eh_proj.weight[:, CONFIG.hidden_size :] = 0
    before = model(ids, labels=ids)
    with torch.no_grad():
        module.hnorm.weight.mul_(2)
    torch.testing.assert_close(model(ids, labels=ids).mtp_loss, before.mtp_loss)
    with torch.no_grad():
        module.enorm.weight.mul_(2)
    assert (model(ids, labels=ids).mtp_loss - before.mtp_loss).abs() > 1e-3


def test_only_in_training_with_labels(model: Transformer) -> None:
    """Evaluation and generation never pay for it."""
    ids = torch.randint(61, (1, 9))
    assert model(ids).mtp_loss is None
    assert model.eval()(ids, labels=ids).mtp_loss is None
    assert model.generate([[1, 2, 3]], 4) == Transformer.generate(model, [[1, 2, 3]], 4)


def test_ignored_labels_have_no_part(model: Transformer) -> None:
    """A label of -100 is scored by no module; the mean is over the others."""
    ids = torch.randint(61, (2, 9))
    labels = ids.clone()
    labels[1] = -100
    torch.testing.assert_close(model(ids, labels=labels).mtp_loss, model(ids[:1], labels=ids[:1]).mtp_loss)


def test_its_routers_are_balanced_too(model: Transformer) -> None:
    """Their loads are those of the tokens they see: one position fewer per depth."""
    balancer = Balancer(model)
    ids = torch.randint(61, (2, 9))
    model(ids, labels=ids).mtp_loss.backward()
    load = balancer.step()
    assert set(load.tokens_per_expert) == set(find_routers(model))
    rows = {name: int(counts.sum()) // 2 for name, counts in load.tokens_per_expert.items()}
    assert rows == {"layers.1.mlp.router": 18, "mtp.0.layer.mlp.router": 16, "mtp.1.layer.mlp.router": 14}
    assert {"router/max_vio/layer_01", "router/max_vio/mtp_0", "router/max_vio/mtp_1"} <= set(load.metrics())


def test_the_dense_twin_has_none() -> None:
    """Twins are compared by what they answer with: no multi-token prediction on either side."""
    assert CONFIG.dense_twin().num_nextn_predict_layers == 0
