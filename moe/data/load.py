"""The section `data` into what training reads: sources, tokenizer, tokens, sequences, in this order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from moe.config import DataConfig
from moe.data.mixture import Mixture
from moe.data.sequences import CountedSequences, SequenceReader, Sequences
from moe.data.shards import PreparedFolder
from moe.data.shuffle import ShuffledDocuments
from moe.data.sources import Source, open_source
from moe.data.streaming import TokenStream, fingerprint
from moe.data.tokenizer import DocumentEncoder, copy_tokenizer, tokenizer_file, train_tokenizer
from moe.data.tokens import DataFacts, SourceTokens, SplitTokens, joint_sha256, tokenise_split
from moe.errors import DataError

__all__ = ["Sampling", "TrainingData", "load_data", "make_tokenizer", "open_encoder", "open_sources", "own_texts"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens become this rank's sequences."""

    seq_len: int
    seed: int
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class TrainingData:
    """What the trainer reads. `end_token` is the id that ends a document."""

    train: SequenceReader
    validation: CountedSequences
    facts: DataFacts
    end_token: int


@dataclass(frozen=True)
class _Part:
    """One source, ready to be read."""

    train: SequenceReader
    train_tokens: int | None
    train_sha256: str
    validation: SplitTokens
    sha256: str


def open_sources(config: DataConfig) -> list[Source | PreparedFolder]:
    """What `data.source` names. Raises DataError for what is not there."""
    return [
        PreparedFolder(Path(word)) if PreparedFolder.is_at(Path(word)) else open_source(word, config)
        for word in config.sources
    ]


def make_tokenizer(sources: Sequence[Source | PreparedFolder], config: DataConfig, vocab_size: int, file: Path) -> None:
    """Write the run's tokenizer to `file`: that of data.tokenizer, of a prepared folder, or trained on the sources."""
    prepared = [source for source in sources if isinstance(source, PreparedFolder)]
    if config.tokenizer is not None:
        copy_tokenizer(tokenizer_file(config.tokenizer), config.end_token, file)
    elif prepared:
        copy_tokenizer(prepared[0].tokenizer, config.end_token, file)
    else:
        texts = [source for source in sources if isinstance(source, Source)]
        first = (islice(source.documents("train"), config.tokenizer_documents) for source in texts)
        train_tokenizer(chain.from_iterable(first), vocab_size, file)


def open_encoder(tokenizer: Path, vocab_size: int) -> DocumentEncoder:
    """The tokenizer at `tokenizer`. Raises DataError when it has more tokens than the model."""
    encoder = DocumentEncoder(tokenizer)
    if encoder.size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} is less than the {encoder.size} tokens of {tokenizer}; "
            f"set model.vocab_size={encoder.size}, or more"
        )
    return encoder


def own_texts(
    sources: Sequence[Source | PreparedFolder], config: DataConfig, tokens: Path
) -> Iterator[tuple[Source, Path]]:
    """The sources whose text the run tokenises itself, each with the folder under `tokens` that holds what it gives."""
    for number, source in enumerate(sources):
        if isinstance(source, Source) and not config.streaming:
            yield source, tokens / str(number)


def load_data(
    sources: Sequence[Source | PreparedFolder],
    config: DataConfig,
    encoder: DocumentEncoder,
    tokens: Path,
    sampling: Sampling,
    *,
    verify: bool = True,
) -> TrainingData:
    """Training and validation sequences. What `own_texts` names must be tokenised by now.

    `verify` compares the shards of prepared folders with their hashes: one rank is enough. Raises DataError or
    ConfigError for what cannot be trained on.
    """
    folders: dict[Source | PreparedFolder, Path] = dict(own_texts(sources, config, tokens))
    parts = [_part(source, folders.get(source), config, encoder, sampling, verify=verify) for source in sources]
    held_out = [Sequences(part.validation.tokens, sampling.seq_len, None) for part in parts]
    weights = config.weights or (1.0,)
    facts = _facts(config, weights, parts, encoder)
    if len(parts) == 1:
        return TrainingData(parts[0].train, held_out[0], facts, encoder.end_token)
    train = Mixture([part.train for part in parts], weights)
    return TrainingData(train, Mixture(held_out, weights), facts, encoder.end_token)


def _part(
    source: Source | PreparedFolder, folder: Path | None, config: DataConfig, encoder: DocumentEncoder,
    sampling: Sampling, *, verify: bool,
) -> _Part:  # fmt: skip
    if isinstance(source, PreparedFolder):
        tokens = _prepared(source, encoder, verify)
        sha256 = tokens.sha256
    elif folder is not None:
        tokens = PreparedFolder(folder).tokens(verify=False)  # whoever made them, or found them, has just seen them
        sha256 = joint_sha256((tokens.train.sha256, tokens.validation.sha256))  # the text, wherever its tokens lie
    else:
        return _streamed(source, config, encoder, sampling)
    train = Sequences(tokens.train.tokens, sampling.seq_len, sampling.seed)
    return _Part(train, len(tokens.train.tokens), tokens.train.sha256, tokens.validation, sha256)


def _prepared(folder: PreparedFolder, encoder: DocumentEncoder, verify: bool) -> SourceTokens:
    if not folder.made_with(encoder):
        raise DataError(
            f"data.source={folder.name!r} was prepared with another tokenizer than the run's; prepare all of the run's "
            "folders with one --tokenizer, and leave data.tokenizer and data.end_token none"
        )
    return folder.tokens(verify=verify)


def _streamed(source: Source, config: DataConfig, encoder: DocumentEncoder, sampling: Sampling) -> _Part:
    """A stream's text cannot be hashed ahead: its name stands for it."""
    texts = list(islice(source.documents("validation"), config.validation_documents))
    validation = tokenise_split(source.name, texts, encoder)
    documents = source.stream(sampling.rank, sampling.ranks)
    if config.shuffle_buffer:
        documents = ShuffledDocuments(documents, config.shuffle_buffer, sampling.seed)
    left_out = frozenset(map(fingerprint, texts))
    train = TokenStream(source.name, documents, encoder, sampling.seq_len, left_out, ranks=sampling.ranks)
    train_sha256 = joint_sha256((source.name,))
    return _Part(train, None, train_sha256, validation, joint_sha256((train_sha256, validation.sha256)))


def _facts(config: DataConfig, weights: Sequence[float], parts: Sequence[_Part], encoder: DocumentEncoder) -> DataFacts:
    """Of one source its own; of several the mixture's: validation as far as the mixture goes before one is used up."""
    shares = [weight / sum(weights) for weight in weights]
    validation = [part.validation for part in parts]
    tokens = min(len(split.tokens) / share for split, share in zip(validation, shares, strict=True))
    bytes_per_token = sum(
        share * split.bytes / len(split.tokens) for split, share in zip(validation, shares, strict=True)
    )

    def joint(parts_sha256: list[str]) -> str:
        return parts_sha256[0] if len(parts) == 1 else joint_sha256((*parts_sha256, repr(shares)))

    lengths = [part.train_tokens for part in parts]
    return DataFacts(
        source=config.source,
        corpus_sha256=joint([part.sha256 for part in parts]),
        train_sha256=joint([part.train_sha256 for part in parts]),
        validation_sha256=joint([split.sha256 for split in validation]),
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.size,
        train_tokens=None if None in lengths else sum(length or 0 for length in lengths),
        validation_tokens=round(tokens),
        validation_bytes=round(tokens * bytes_per_token),
    )
