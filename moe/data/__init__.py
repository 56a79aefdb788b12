"""Text to batches: sources -> documents -> tokenizer -> tokens, in shards or as a stream -> sequences."""

from moe.data.given import WithinVocabulary, data_from_tokens
from moe.data.load import Sampling, TrainingData, load_data, make_tokenizer, open_encoder, open_sources, own_texts
from moe.data.mixture import Mixture
from moe.data.prefetch import Prefetch
from moe.data.sequences import SequenceReader, Sequences
from moe.data.tokens import DataFacts

__all__ = [
    "DataFacts",
    "Mixture",
    "Prefetch",
    "Sampling",
    "SequenceReader",
    "Sequences",
    "TrainingData",
    "WithinVocabulary",
    "data_from_tokens",
    "load_data",
    "make_tokenizer",
    "open_encoder",
    "open_sources",
    "own_texts",
]
