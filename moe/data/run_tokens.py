"""The tokens of a run's own text, as a prepared folder: made by one rank, read by all, made anew for another text."""

from pathlib import Path

from moe.data.shards import PreparedFolder
from moe.data.sources import Source, Split
from moe.data.tokenizer import DocumentEncoder, copy_tokenizer
from moe.data.tokens import Tally
from moe.data.write_shards import SHARD_TOKENS, SPLITS, fill, new_index, progress
from moe.errors import DataError

__all__ = ["holds", "tokenise"]


def holds(folder: Path, source: Source, encoder: DocumentEncoder) -> bool:
    """Whether `folder` is what `tokenise` would make: whole, by this tokenizer, of this text, which is read for it.

    Raises DataError when the text cannot be read.
    """
    try:
        kept = PreparedFolder(folder)
        if not kept.made_with(encoder):
            return False
        kept.tokens(verify=True)
    except (DataError, KeyError, TypeError):  # an index that somebody changed
        return False
    return all(_sha256_of_text(source, split) == kept.index[split]["sha256"] for split in SPLITS)


def tokenise(source: Source, encoder: DocumentEncoder, out: Path) -> None:
    """Both splits of `source` into the new folder `out`, in constant memory.

    Raises DataError when the text cannot be read, OSError when `out` cannot be written.
    """
    out.mkdir()
    copy_tokenizer(encoder.file, None, out / "tokenizer.json")
    fill([source], encoder, out, new_index({"sources": [source.name], "shard_tokens": SHARD_TOKENS}))


def _sha256_of_text(source: Source, split: Split) -> str:
    tally = Tally(source.name)
    with progress(f"{source.name} {split}, comparing") as bar:
        for _ in tally.through(source.documents(split)):
            bar.update(tally.bytes - bar.n)
    return tally.sha256
