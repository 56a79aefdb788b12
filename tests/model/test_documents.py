"""Documents packed into one sequence do not see one another; padding is neither attended to, scored nor counted."""

import pytest
import torch

from moe.balancer import Balancer, LoadCounter
from moe.cache import Cache
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.model import Transformer

MLA = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, num_nextn_predict_layers=1, initializer_range=0.3,
)  # fmt: skip
GQA = MLA.replace(attention="gqa", num_key_value_heads=1, qk_norm="head")
LENGTHS = (4, 1, 7)
IDS = torch.tensor([0] * 4 + [1] + [2] * 7)[None]


@pytest.fixture(params=[MLA, GQA], ids=["mla", "gqa"])
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(0)
    return Transformer(request.param)


def test_each_document_is_as_if_alone(model: Transformer) -> None:
    """Logits of the packed sequence are those of the documents one by one, without new positions."""
    ids = torch.randint(61, (1, sum(LENGTHS)))
    packed = model(ids, document_ids=IDS).logits
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    assert (model(ids).logits - alone).abs().max() > 0.1  # and without the mask they are not


def test_further_tokens_of_another_document_are_not_predicted(model: Transformer) -> None:
    """Multi-token prediction stops where a document ends: what counts is what counts in the documents alone."""
    ids = torch.randint(61, (1, sum(LENGTHS)))
    found = model(ids, labels=ids, document_ids=IDS).mtp_loss
    whole = ids.shape[1] - 2  # labelled positions: all but the last two
    wanted = torch.zeros(())
    start = 0
    for length in LENGTHS:
        # the document and the token after it, which its last position may still be scored against
        part = ids[:, start : start + length + 1]
        documents = torch.zeros_like(part)
        documents[:, length:] = 1
        if part.shape[1] > 2:
            loss = model(part, labels=part, document_ids=documents).mtp_loss
            wanted = wanted + loss * (part.shape[1] - 2)
        start += length
    torch.testing.assert_close(found, wanted / whole, atol=1e-5, rtol=1e-5)


def test_padding_counts_for_nothing(model: Transformer) -> None:
    """Loads, margins and balance losses are those of the tokens without the padding."""
    settings = {"aux_loss_alpha": 0.1, "sequence_loss_alpha": 0.1, "z_loss_alpha": 0.1}
    ids = torch.randint(61, (1, 9))
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=ids.dtype)), dim=1)
    labels = torch.cat((ids, torch.full((1, 5), -100)), dim=1)
    documents = torch.tensor([0] * 9 + [-1] * 5)[None]
    results = []
    for arguments in (
        {"input_ids": ids, "labels": ids},
        {"input_ids": padded, "labels": labels, "document_ids": documents},
    ):
        torch.manual_seed(0)
        model = Transformer(model.config)
        balancer = Balancer(model, method="quantile", **settings)  # type: ignore[arg-type]
        out = model(**arguments)
        load = balancer.step()
        biases = [tensor for name, tensor in model.named_buffers() if name.endswith("expert_bias")]
        results.append((out.loss, out.mtp_loss, out.balance_loss, load, biases))
    (loss, mtp, balance, load, biases), (loss2, mtp2, balance2, load2, biases2) = results
    torch.testing.assert_close((loss2, mtp2, balance2), (loss, mtp, balance), atol=1e-5, rtol=1e-5)
    for name, counts in load.tokens_per_expert.items():
        assert torch.equal(load2.tokens_per_expert[name], counts), name
        torch.testing.assert_close(load2.confidence[name], load.confidence[name], atol=1e-5, rtol=1e-5)
    for one, other in zip(biases, biases2, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_not_over_a_cache(model: Transformer) -> None:
    """Decoding continues one document."""
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="document_ids are for whole sequences"):
        model(ids, cache=Cache(model.config, 1, 8), document_ids=ids)


def test_nothing_labelled_adds_nothing(model: Transformer) -> None:
    """A micro-batch of padding alone: loss 0, gradients 0, no NaN."""
    ids = torch.zeros(1, 6, dtype=torch.int64)
    out = model(ids, labels=torch.full_like(ids, -100), document_ids=torch.full_like(ids, -1))
    (out.loss + out.mtp_loss).backward()
    assert out.loss == out.mtp_loss == 0
    assert not model.lm_head.weight.grad.any()


def test_an_evaluation_does_not_count_padding(model: Transformer) -> None:
    """What LoadCounter sees is what the balancer would."""
    ids = torch.randint(61, (1, 9))
    with LoadCounter(model) as counter, torch.no_grad():
        model(ids, document_ids=torch.tensor([[0] * 6 + [-1] * 3]))
    assert {int(load.sum()) for load in counter.load().tokens_per_expert.values()} == {12}
