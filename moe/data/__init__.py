"""Text to batches: corpus -> tokenizer -> token arrays -> sequences by number."""

from moe.data.corpus import Corpus, load_corpus
from moe.data.sequences import Sequences
from moe.data.tokens import TokenData, prepare

__all__ = ["Corpus", "Sequences", "TokenData", "load_corpus", "prepare"]
