"""docs/pitfalls.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_pitfall_names_tests_that_exist() -> None:
    """A row without a test, or with one that was renamed, is not watched."""
    lines = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| pitfall")]
    assert len(rows) >= 15
    for row in rows:
        watched = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row.rpartition(" | ")[2])
        assert watched, row
        for file, name in watched:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8") or not name, f"{file}::{name}"
