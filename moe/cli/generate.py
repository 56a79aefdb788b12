"""`moe generate`: what a trained run says after a prompt."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at the most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt with the newest whole checkpoint of a run, over its compressed cache."""
    from moe.checkpoint import newest_whole
    from moe.rundir import RunDir

    directory = RunDir.existing(run)
    checkpoint, complaints = newest_whole(directory.checkpoints)
    for complaint in complaints:
        print(f"passed over: {complaint}", file=sys.stderr)
    if checkpoint is None:
        raise ConfigError(f"{run} has no checkpoint yet; train it, or name a run that has one")

    import torch
    from tokenizers import Tokenizer

    from moe.data.tokenizer import DocumentEncoder
    from moe.model import Transformer

    tokenizer = Tokenizer.from_file(str(directory.tokenizer))
    model = Transformer.from_pretrained(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = DocumentEncoder(directory.tokenizer).end_token
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]  # an empty prompt starts a document
    new = model.to(device).generate(
        [ids], tokens, temperature=temperature, end_token=end, generator=torch.Generator(device).manual_seed(seed)
    )
    print(prompt + tokenizer.decode(new[0]))
