"""README.md is true: its examples run, its tree is the tree, its files exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- test: (python|console) -->\n```\w+\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples() -> None:
    """A layer, a metered program, a window."""
    assert [kind for kind, _ in EXAMPLES] == ["python", "console", "python"]


@pytest.mark.parametrize(("kind", "text"), EXAMPLES)
def test_an_example_runs(kind: str, text: str, tmp_path: Path) -> None:
    """As printed, in an empty folder; every command of a console example must succeed."""
    path = f"{ROOT}:{ROOT / 'kernels'}"
    if kind == "python":
        commands = [[sys.executable, "-W", "error", "-c", text]]
    else:
        lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        assert lines
        shell = f'moe() {{ "{sys.executable}" -m moe.cli "$@"; }}; python() {{ "{sys.executable}" "$@"; }}\n'
        commands = [["bash", "-ec", shell + line.replace("-- python", f'-- "{sys.executable}"')] for line in lines]
    for command in commands:
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_tree_is_the_tree() -> None:
    """`scripts/tree --write` mends it."""
    printed = subprocess.run([sys.executable, str(ROOT / "scripts/tree")], capture_output=True, text=True, check=True)
    assert f"<!-- tree -->\n```\n{printed.stdout}```\n<!-- /tree -->" in README


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link and picture of a page exists."""
    file = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target
