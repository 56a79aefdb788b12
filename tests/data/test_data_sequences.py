"""Sequences: a batch is a function of seed and number, whatever the number of ranks; mixtures keep their shares."""

import numpy as np
import pytest
import torch

from moe.data import Mixture, Sequences
from moe.data.sequences import document_ids
from moe.errors import ConfigError


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    """However the stream is cut into batches and ranks, sequence n is the same; each epoch serves every row once."""
    tokens = np.arange(50 * 4 + 3, dtype=np.uint16)
    whole = Sequences(tokens, 4, seed=7).batch(0, 120)
    assert whole.dtype == torch.int64
    for ranks in (1, 2, 4):
        share = 120 // ranks
        parts = [Sequences(tokens, 4, seed=7).batch(rank * share, share) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    backwards = Sequences(tokens, 4, seed=7)
    assert torch.equal(backwards.batch(110, 10), whole[110:])
    assert torch.equal(backwards.batch(0, 10), whole[:10])
    first, second = whole[:50, 0].tolist(), whole[50:100, 0].tolist()
    assert sorted(first) == sorted(second) == list(range(0, 200, 4))
    assert first != second
    assert not torch.equal(Sequences(tokens, 4, seed=8).batch(0, 50), whole[:50])
    assert torch.equal(Sequences(tokens, 4, seed=None).batch(0, 50).flatten(), torch.arange(200))


def test_too_little_text_for_one_sequence() -> None:
    """One sentence with both numbers."""
    with pytest.raises(ConfigError, match=r"train\.seq_len=64 exceeds the data \(10 tokens\)"):
        Sequences(np.arange(10, dtype=np.uint16), 64, seed=0)


def test_a_mixture_keeps_its_shares_everywhere() -> None:
    """Any stretch of sequences has each part's share to within one a part; each part's sequences come in order."""
    weights = (5.0, 3.0, 2.0)
    mixture = Mixture([], weights)
    places = [mixture.place(index) for index in range(10_000)]
    for part in range(3):
        assert [number for where, number in places if where == part] == list(range(int(1000 * weights[part])))
    for start in range(0, 9_000, 70):
        stretch = [part for part, _ in places[start : start + 100]]
        assert all(abs(stretch.count(part) - 10 * weights[part]) <= 2 for part in range(3))
    assert [Mixture([], (1.0, 1.0)).place(index) for index in range(4)] == [(1, 0), (0, 0), (1, 1), (0, 1)]
    far = 10**15
    assert mixture.place(far)[1] == pytest.approx(far * weights[mixture.place(far)[0]] / 10)


def test_a_mixture_is_the_same_for_any_number_of_ranks() -> None:
    """1, 4 and 2 ranks, each from a start of its own, see the same sequences at the same places."""

    def mixture() -> Mixture:
        small, large = np.arange(40, dtype=np.uint16), np.arange(1000, 1400, dtype=np.uint16)
        return Mixture([Sequences(small, 4, seed=3), Sequences(large, 4, seed=3)], (1.0, 4.0))

    whole = mixture().batch(0, 96)
    assert len(set(whole[whole[:, 0] < 1000][:10, 0].tolist())) == 10, "an epoch of the small part, each once"
    seen, ranks_now = [], {0: 1, 1: 4, 2: 2}
    for third, ranks in ranks_now.items():
        share = 32 // ranks
        seen += [mixture().batch(third * 32 + rank * share, share) for rank in range(ranks)]
    assert torch.equal(torch.cat(seen), whole)


def test_a_mixture_for_evaluation_ends_where_a_part_would_repeat() -> None:
    """Its length is the largest whose sequences are all different."""
    parts = [Sequences(np.arange(start, start + 4 * count), 4, seed=None) for start, count in ((0, 10), (1000, 25))]
    for weights in ((1.0, 1.0), (1.0, 9.0), (9.0, 1.0), (2.0, 5.0)):
        mixture = Mixture(parts, weights)
        starts = mixture.batch(0, len(mixture) + 1)[:, 0].tolist()
        assert len(set(starts[:-1])) == len(mixture) < len(starts)
        assert len(set(starts)) == len(mixture), "one more would repeat"


def test_a_document_ends_with_its_end_token() -> None:
    """The end token belongs to the document it ends; two in a row are an empty document."""
    ids = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 1, 1, 1, 1, 1]])
    assert document_ids(ids, 0).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
