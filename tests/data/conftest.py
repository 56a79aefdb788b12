"""Documents to read in every form a source may have, and a tokenizer trained on them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe.data.tokenizer import train_tokenizer


def documents(count: int, seed: int = 0) -> list[str]:
    """Documents of a few dozen words, no two alike, with letters beyond ASCII."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlü", k=chance.randint(2, 7))) for _ in range(200)]
    return [f"{number}: {' '.join(chance.choices(words, k=chance.randint(5, 60)))}.\n" for number in range(count)]


def write_jsonl(file: Path, texts: Sequence[str | None], field: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)))
    return file


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer.json of 300 tokens that most tests use."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(documents(200), 300, file)
    return file
