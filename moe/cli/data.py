"""`moe data prepare`: text into tokens once, ahead of training."""

from pathlib import Path
from typing import Annotated

import typer

from moe.config import DataConfig

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

_DEFAULTS = DataConfig()


@app.callback()
def _group() -> None:
    """Prepare text for training."""


@app.command()
def prepare(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="As in data.source, one word each, read in this order.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to fill, or to go on with.")],
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="Train a tokenizer of N tokens on the text.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Use this tokenizer.json, or that of a folder.", show_default=False),
    ] = None,
    end_token: Annotated[
        str | None,
        typer.Option(help="Its token that ends a document; by default the one it names.", show_default=False),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="Field or column with the text of a JSONL, Parquet or hf: row.")
    ] = _DEFAULTS.text_field,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents kept for validation.")
    ] = _DEFAULTS.validation_fraction,
    tokenizer_documents: Annotated[
        int, typer.Option(help="Train the tokenizer on so many first documents of each source.")
    ] = _DEFAULTS.tokenizer_documents,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a shard file.")] = 1 << 28,
) -> None:
    """Tokenise text into shards that data.source=DIR trains from.

    After a kill the same command goes on; finished shards are kept, and the outcome is the same to the byte.
    """
    from moe.data.prepare import prepare as prepare_folder
    from moe.data.shards import PreparedFolder

    config = DataConfig(
        source=",".join(sources),
        weights=(1.0,) * len(sources),
        text_field=text_field,
        tokenizer=tokenizer,
        tokenizer_documents=tokenizer_documents,
        end_token=end_token,
        validation_fraction=validation_fraction,
    )
    prepared = prepare_folder(config, out, vocab_size=vocab_size, shard_tokens=shard_tokens)
    index = PreparedFolder(out).index
    if not prepared:
        print(f"{out} was complete already")
    for split in ("train", "validation"):
        facts = index[split]
        print(
            f"{split}: {facts['documents']:,} documents, {facts['bytes']:,} bytes, {facts['tokens']:,} tokens in "
            f"{len(facts['shards'])} shards, text sha256 {facts['sha256'][:16]}"
        )
    print(f"train with data.source={out} model.vocab_size={index['vocab_size']}")
