"""Decoding over the compressed cache: the same text as full forwards, from exactly the memory it promises."""

import pytest
import torch

from moe.cache import Cache
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.model import Transformer

MLA = ModelConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, q_lora_rank=14,
    kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=6, n_shared_experts=1,
    num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1,
)  # fmt: skip
YARN = MLA.replace(
    rope_type="yarn", rope_factor=4.0, rope_original_max_position_embeddings=8, rope_mscale=1.0, rope_mscale_all_dim=1.0
)
GQA = MLA.replace(attention="gqa", num_key_value_heads=1, qk_norm="head")
LLAMA3 = GQA.replace(rope_type="llama3", rope_factor=4.0, rope_original_max_position_embeddings=8, clip_qkv=0.5)
CASES = {"mla": MLA, "mla-yarn": YARN, "gqa": GQA, "gqa-llama3-clipped": LLAMA3, "mla-dense": MLA.dense_twin()}


def _model(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)  # initial weights hardly tell tokens apart; sharper ones make text worth comparing
    return model


def _argmax_continuation(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The oracle: a full forward over everything so far for each new token."""
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_text_equals_full_forwards(case: str) -> None:
    """Prompts of unequal lengths in one batch: every token is the no-cache argmax, for each row alone."""
    model = _model(CASES[case])
    prompts = [[5, 9, 33], [7], [60, 1, 2, 3, 4, 5, 6, 7, 8], [11, 12]]
    texts = model.generate(prompts, 12)
    assert model.training  # generation leaves the mode as it was
    assert texts == [_argmax_continuation(model, prompt, 12) for prompt in prompts]
    assert len({tuple(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunks", [(20,), (7, 1, 1, 11), (1,) * 20, (19, 1)])
def test_logits_do_not_depend_on_how_tokens_arrive(case: str, chunks: tuple[int, ...]) -> None:
    """Expanded prefill, absorbed single tokens and absorbed chunks give the logits of one forward, in fp64."""
    model = _model(CASES[case]).double().eval()
    ids = torch.randint(0, 61, (2, 20))
    cache = Cache(model.config, 2, 20, dtype=torch.float64)
    with torch.no_grad():
        whole = model(ids).logits
        parts = torch.cat([model(part, cache=cache).logits for part in ids.split(list(chunks), dim=1)], dim=1)
    assert cache.length == 20
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-5)  # routers score in fp32


def test_the_latent_cache_holds_exactly_the_latents() -> None:
    """layers x (kv_lora_rank + qk_rope_head_dim) numbers a token, and nothing beside."""
    cache = Cache(MLA, batch_size=4, max_length=50)
    assert cache.elements_per_token == 3 * (10 + 4)
    tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) == 4 * 50 * 3 * (10 + 4)
    gqa = Cache(GQA, batch_size=4, max_length=50)
    assert gqa.elements_per_token == 3 * 2 * 1 * 8


def test_generation_stops_at_the_end_token() -> None:
    """A row ends with its end token; others go on; all ended ends the loop."""
    model = _model(MLA)
    free = model.generate([[5, 9, 33], [7]], 12)
    end = free[0][3]
    stopped = model.generate([[5, 9, 33], [7]], 12, end_token=end)
    assert stopped[0] == free[0][: free[0].index(end) + 1]
    assert stopped[1] == (free[1][: free[1].index(end) + 1] if end in free[1] else free[1])


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    """The same generator gives the same text; frequencies of the first token are softmax(logits / temperature)."""
    model = _model(MLA)
    draws = [
        model.generate([[5]] * 2000, 1, temperature=2.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0)
    ]
    assert draws[0] == draws[1]
    counts = torch.bincount(torch.tensor(draws[0]).flatten(), minlength=61) / 2000
    with torch.no_grad():
        wanted = (model.eval()(torch.tensor([[5]])).logits[0, -1] / 2.0).softmax(-1)
    # a share estimated from 2000 draws is off by at most 4.5 standard deviations (sqrt(p (1 - p) / 2000)) anywhere
    assert ((counts - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / 2000).sqrt() + 1e-3).all()


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([], {}, r"prompts=\[\] tokens: give at least one"),
        ([[1], []], {}, r"prompts=\[1, 0\] tokens: give at least one, none of them empty"),
        ([[1]], {"temperature": -1.0}, r"temperature=-1\.0 must be at least 0"),
    ],
)
def test_bad_requests_are_one_sentence(prompts: list[list[int]], options: dict[str, float], sentence: str) -> None:
    """No prompt, an empty one, a negative temperature."""
    with pytest.raises(ConfigError, match=sentence):
        _model(MLA).generate(prompts, 2, **options)  # type: ignore[arg-type]


def test_a_full_cache_is_one_sentence() -> None:
    """More tokens than room."""
    model = _model(MLA)
    with torch.no_grad(), pytest.raises(ConfigError, match="max_length=4 has no room for 5 tokens after 0"):
        model(torch.zeros(1, 5, dtype=torch.int64), cache=Cache(MLA, 1, 4))
