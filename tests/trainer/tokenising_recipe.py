"""The tiny recipe with a tokenizer that is watched, and a machine that fails it on demand.

ENCODED=file      one line a document that is tokenised: the rank that did it
SLOW=s            seconds that each document takes
ROOM=n            no file may become larger than n bytes once tokenising begins, as on a full disk
APART=1           each rank has a run.directory of its own, as nodes that share none
"""

import dataclasses
import os
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tiny_recipe import RECIPE

from moe.config import RunConfig
from moe.data.tokenizer import DocumentEncoder
from moe.trainer import entry, main

RANK = os.environ.get("RANK", "0")
encode = DocumentEncoder.encode


def watched(encoder: DocumentEncoder, documents: Iterable[str]) -> Iterator[NDArray[Any]]:
    if "ROOM" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["ROOM"]), resource.RLIM_INFINITY))
    for ids in encode(encoder, documents):
        if "ENCODED" in os.environ:
            with Path(os.environ["ENCODED"]).open("a") as file:
                file.write(f"{RANK}\n")
        time.sleep(float(os.environ.get("SLOW", "0")))
        yield ids


if __name__ == "__main__":
    DocumentEncoder.encode = watched  # type: ignore[method-assign]
    directory = f"runs{RANK}" if "APART" in os.environ else "runs"
    entry._SEEN_WITHIN_S = 1.0
    main(dataclasses.replace(RECIPE, run=RunConfig(name="tiny", directory=directory)))
