"""`moe recipe`: what is listed, what a copy takes along, and what it never overwrites."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe
from moe.cli import recipe

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe.cli", "recipe", *words], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_every_recipe_is_listed_with_its_first_line(tmp_path: Path) -> None:
    """A name and the first line of the docstring, one a line."""
    done = run(tmp_path, "list")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    for path in (ROOT / "recipes").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert listed[path.stem] == docstring.splitlines()[0]


def test_a_copy_brings_what_it_imports_and_runs(tmp_path: Path) -> None:
    """The dense twin needs the mixture's file; the printed command names the copy."""
    done = run(tmp_path, "copy", "quickstart_dense", "--to", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "written: mine/quickstart_dense.py",
        "written: mine/quickstart_moe.py",
        "launch with: accelerate launch mine/quickstart_dense.py run.name=mine",
    ]
    for path in (tmp_path / "mine").iterdir():
        assert path.read_bytes() == (ROOT / "recipes" / path.name).read_bytes()
    helped = subprocess.run(
        [sys.executable, "mine/quickstart_dense.py", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert helped.returncode == 0, helped.stderr
    assert "train.max_steps" in helped.stdout


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Neither the recipe nor, when somebody changed it, what it imports; unchanged files may be shared."""
    assert run(tmp_path, "copy", "quickstart_moe").returncode == 0
    again = run(tmp_path, "copy", "quickstart_moe.py")
    assert (again.returncode, again.stderr) == (
        2, "moe: quickstart_moe.py exists and is not overwritten; give another folder with --to DIR\n"
    )  # fmt: skip
    assert run(tmp_path, "copy", "quickstart_dense").returncode == 0
    (tmp_path / "quickstart_dense.py").unlink()
    (tmp_path / "quickstart_moe.py").write_text("# mine\n")
    changed = run(tmp_path, "copy", "quickstart_dense")
    assert (changed.returncode, changed.stdout) == (2, "")
    assert "quickstart_moe.py exists and is not overwritten" in changed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart_moe.py"]
    assert (tmp_path / "quickstart_moe.py").read_text() == "# mine\n"


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    """An unknown name gets the nearest known one; a place that cannot be a folder is named."""
    unknown = run(tmp_path, "copy", "quickstart_mo")
    assert (unknown.returncode, unknown.stderr) == (
        2, "moe: 'quickstart_mo' is not a recipe; did you mean 'quickstart_moe'?\n"
    )  # fmt: skip
    (tmp_path / "file").write_text("")
    blocked = run(tmp_path, "copy", "quickstart_moe", "--to", "file")
    assert blocked.returncode == 2
    assert len(blocked.stderr.splitlines()) == 1
    assert blocked.stderr.startswith("moe: --to file cannot be written")


def test_launch_configurations_keep_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file under launch/ is listed by its opening comment and copied to launch/, as recipes name it."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("launch", "__pycache__"))
    (tmp_path / "recipes/launch").mkdir()
    (tmp_path / "recipes/launch/pair.yaml").write_text("# Two processes of one machine.\nnum_processes: 2\n")
    monkeypatch.setattr(moe, "__file__", str(tmp_path / "moe/__init__.py"))
    recipe.list_command()
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == [
        "launch/pair", "Two processes of one machine."
    ]  # fmt: skip
    recipe.copy("launch/pair", tmp_path / "there")
    assert (tmp_path / "there/launch/pair.yaml").read_text().endswith("num_processes: 2\n")
    assert f"--config_file {tmp_path}/there/launch/pair.yaml" in capsys.readouterr().out
