"""Streams: every rank its own share, nothing of validation in it, and the very same sequences after a restart."""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe.config import DataConfig
from moe.data import Prefetch, Sampling, TrainingData, load_data, open_sources
from moe.data.tokenizer import DocumentEncoder
from moe.errors import ConfigError, DataError

from .conftest import documents, write_jsonl

TEXTS = documents(60)
SEQ_LEN = 64

Load = Callable[..., TrainingData]


@pytest.fixture(params=["jsonl", "saved", "builder", "mixture"])
def load(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a rank's stream of 60 documents, read by our own readers or by `datasets`, from one file or several."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    for number in range(4):
        write_jsonl(tmp_path / "builder" / f"train-{number}.jsonl", TEXTS[number::4])
    rows = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    words = {"jsonl": f"{rows}", "saved": f"hf:{tmp_path / 'saved'}", "builder": f"hf:{tmp_path / 'builder'}"}
    words["mixture"] = f"{words['builder']},{words['jsonl']}"
    word = words[request.param]

    def loaded(rank: int = 0, ranks: int = 1, **fields: object) -> TrainingData:
        config = DataConfig(
            source=word, streaming=True, validation_documents=3, validation_fraction=0.1,
            weights=(2.0, 1.0) if "," in word else (), **fields,  # type: ignore[arg-type]
        )  # fmt: skip
        sampling = Sampling(seq_len=SEQ_LEN, seed=1, rank=rank, ranks=ranks)
        return load_data(open_sources(config), config, DocumentEncoder(tokenizer), tmp_path, sampling)

    return loaded


def heads(data: TrainingData, tokenizer: Path, sequences: int) -> set[int]:
    """Numbers of the documents that begin in the first sequences; in a mixture, within one of them."""
    plain = Tokenizer.from_file(str(tokenizer))
    ids = data.train.batch(0, sequences)
    rows = ids.tolist() if "," in data.facts.source else [ids.flatten().tolist()]
    texts = plain.decode_batch(rows, skip_special_tokens=False)
    return {int(number) for text in texts for number in re.findall(r"<\|endoftext\|>(\d+): ", text)}


def test_ranks_share_the_documents_and_validation_has_its_own(load: Load, tokenizer: Path) -> None:
    """Two ranks share what is not for validation, which neither sees in several epochs; one rank reads all of it."""
    one, two = load(0, 2), load(1, 2)
    assert torch.equal(one.validation.batch(0, 3), two.validation.batch(0, 3))
    seen = [heads(data, tokenizer, 400) for data in (one, two)]
    both = seen[0] | seen[1]
    held_out = {"rows.jsonl": {0, 10, 20, 30, 40, 50}, "saved": {0, 1, 2}, "builder": {0, 4, 8}}
    if "," in one.facts.source:  # each source has its own validation
        assert both == set(range(60)) - {0}
    else:
        assert both == set(range(60)) - held_out[Path(one.facts.source).name]
        assert not seen[0] & seen[1]
    assert heads(load(), tokenizer, 800) == both
    assert one.facts.train_tokens is None
    assert one.facts.validation_bytes > 0


@pytest.mark.parametrize("shuffle_buffer", [0, 7], ids=["in order", "shuffled"])
def test_a_stream_goes_on_where_it_was(load: Load, shuffle_buffer: int) -> None:
    """From any batch on, across epochs, a stream restored from JSON gives the same sequences to the last bit."""
    load = partial(load, shuffle_buffer=shuffle_buffer)
    straight = load(1, 2)
    places, batches = [], []
    for number in range(60):
        places.append(json.dumps(straight.train.state()))
        batches.append(straight.train.batch(number * 4, 1 + number % 3))
    for begin in (0, 1, 2, 7, 23, 40, 59):
        resumed = load(1, 2).train
        resumed.restore(json.loads(places[begin]))
        assert json.dumps(resumed.state()) == places[begin]
        for number in islice(range(begin, 60), 8):
            assert torch.equal(resumed.batch(number * 4, 1 + number % 3), batches[number])
    again = load(1, 2).train
    again.batch(0, 9)
    again.restore(json.loads(places[7]))
    assert torch.equal(again.batch(28, 2), batches[7]), "also in a stream that had gone elsewhere"
    assert max(map(len, places)) < 3000, "the state does not grow with what was read"


def test_a_shuffled_stream_has_the_same_documents(load: Load, tokenizer: Path) -> None:
    """Each rank those of its share and no other, in another order for another seed, and never validation's."""
    plain, shuffled, other = (load(0, 2, **fields) for fields in ({}, {"shuffle_buffer": 7}, {"shuffle_buffer": 9}))
    assert torch.equal(plain.validation.batch(0, 3), shuffled.validation.batch(0, 3))
    assert shuffled.facts == plain.facts
    assert heads(plain, tokenizer, 400) == heads(shuffled, tokenizer, 400) == heads(other, tokenizer, 400)
    first = [load(0, 2, **fields).train.batch(0, 9) for fields in ({}, {"shuffle_buffer": 7}, {"shuffle_buffer": 9})]
    assert not any(torch.equal(first[one], first[two]) for one, two in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(load(0, 2, shuffle_buffer=7).train.batch(0, 9), first[1])


def test_prefetching_keeps_the_place_of_what_was_taken(load: Load) -> None:
    """State read along with each batch is that of the batches taken, though the reader is already further."""
    stream = load().train

    def read(_: int) -> tuple[Tensor, dict]:
        return stream.batch(0, 2), stream.state()

    prefetch = Prefetch(read)
    taken = [prefetch.take(number) for number in range(5)]
    prefetch.discard()
    stream.restore(taken[2][1])
    assert torch.equal(prefetch.take(3)[0], taken[3][0])
    assert torch.equal(prefetch.take(4)[0], taken[4][0])
    prefetch.close()


def test_another_number_of_ranks_is_refused(load: Load) -> None:
    """One sentence with both numbers and two ways on."""
    place = load(0, 2).train.state()
    with pytest.raises(ConfigError, match=r"is that of 2 ranks, and there are 4; go on with 2, or train from"):
        load(0, 4).train.restore(place)


@pytest.mark.parametrize("shuffle_buffer", [0, 2], ids=["in order", "shuffled"])
def test_a_rank_without_documents(tmp_path: Path, tokenizer: Path, shuffle_buffer: int) -> None:
    """More ranks than documents: a sentence, not an endless search; so when all there is is held out."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [TEXTS[0] * 9, TEXTS[1], TEXTS[2]])
    config = DataConfig(source=str(rows), streaming=True, validation_fraction=0.1, shuffle_buffer=shuffle_buffer)
    encoder = DocumentEncoder(tokenizer)
    sampling = Sampling(seq_len=SEQ_LEN, seed=1, rank=2, ranks=3)
    data = load_data(open_sources(config), config, encoder, tmp_path, sampling)
    with pytest.raises(DataError, match="has no text for each of 3 ranks; launch fewer, or give more documents"):
        data.train.batch(0, 1)
    write_jsonl(rows, [TEXTS[0] * 9] * 3)
    data = load_data(open_sources(config), config, encoder, tmp_path, Sampling(seq_len=SEQ_LEN, seed=1))
    with pytest.raises(DataError, match="has no text for each of 1 ranks"):
        data.train.batch(0, 1)
