"""The wheel holds everything that runs and nothing else: built, installed elsewhere, used from there."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"moe": ROOT / "moe", "moe_kernels": ROOT / "kernels" / "moe_kernels"}
DATA = {".csv", ".json", ".typed"}

# Put before what a child runs: an editable install in this environment must not stand in for what the wheel lacks.
ONLY_INSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [entry for entry in sys.path if entry.rstrip("/") not in {source!r}]
"""


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that an old build/ folder puts nothing into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("moe", "kernels", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(out), cwd=source
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed here")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(target), str(wheel), cwd=target)
    return target


def python(installed: Path, code: str) -> str:
    """Run `code` where only the installed copy can be imported, with warnings as errors."""
    elsewhere = installed.parent
    preamble = ONLY_INSTALLED.format(source={str(ROOT), str(ROOT / "kernels")})
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return run(sys.executable, "-W", "error", "-c", preamble + code, cwd=elsewhere, env=environment)


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """Each source file, recipe, py.typed and data file is in; tests, benchmarks and PyPI's `kernels` name are not."""
    wanted = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix in {".py", *DATA} and "__pycache__" not in path.parts
    }
    recipes = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes").glob("launch/*.yaml")]
    wanted |= {f"moe/recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" for path in recipes}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == wanted
    assert {"moe/py.typed", "moe_kernels/py.typed"} <= names


def test_data_files_have_a_suffix_that_is_packaged() -> None:
    """A data file of another kind would silently stay out of the wheel."""
    strays = [
        str(path.relative_to(ROOT))
        for folder in PACKAGES.values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", *DATA}
    ]
    assert not strays, f"add the suffix to package-data in pyproject.toml: {strays}"


def test_metadata_repeats_pyproject(wheel: Path) -> None:
    """Name, version and the console script are those of pyproject.toml; moe.__version__ agrees."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert f"Name: {project['name']}\n" in text
    assert f"Version: {project['version']}\n" in text
    assert f'__version__ = "{project["version"]}"' in (ROOT / "moe" / "__init__.py").read_text(encoding="utf-8")
    entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert f"moe = {project['scripts']['moe']}" in entry_points


def test_installed_packages_import(installed: Path) -> None:
    """Every public name comes from the installed copy, from another working directory."""
    code = f"""
import moe, moe_kernels
for package in (moe, moe_kernels):
    for name in package.__all__:
        getattr(package, name)
strays = [n for n, m in sys.modules.items() if n.split(".")[0] in ("moe", "moe_kernels")
          and not (m.__file__ or "").startswith({str(installed)!r})]
print(strays)
"""
    assert python(installed, code).split() == ["[]"]


def test_installed_model_computes_a_loss(installed: Path) -> None:
    """A small model runs forward and backward away from the source tree."""
    code = """
import moe, torch
config = moe.ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, attention="gqa",
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
)
tokens = torch.arange(16).view(1, 16)
moe.Transformer(config)(tokens, labels=tokens).loss.backward()
print("ran")
"""
    assert python(installed, code).strip() == "ran"


def test_installed_command_prints_help(installed: Path) -> None:
    """The `moe` command lists its subcommands, and each of those explains itself."""
    ask = "import sys; from moe.cli import main; sys.argv = ['moe', *{words!r}, '--help']; main()"
    text = python(installed, ask.format(words=[]))
    assert "compare" in text
    assert "energy" in text
    for command in ("compare", "energy", "recipe", "runs"):
        assert f"moe {command}" in python(installed, ask.format(words=[command]))
    assert (installed / "bin" / "moe").is_file()


def test_installed_factors_can_be_read(installed: Path) -> None:
    """Every table of the footprint is in the installed copy."""
    code = "from moe.energy.footprint.factors import TABLES, table; print(all(table(name) for name in TABLES))"
    assert python(installed, code).strip() == "True"


def test_installed_recipes_can_be_copied(installed: Path, tmp_path: Path) -> None:
    """Without a checkout: every recipe is listed, and the copy of one that imports another prints its --help."""
    ask = "import sys; from moe.cli import main; sys.argv = ['moe', 'recipe', *{words!r}]; main()"
    listed = python(installed, ask.format(words=["list"]))
    assert {path.stem for path in (ROOT / "recipes").glob("*.py")} <= {line.split()[0] for line in listed.splitlines()}
    said = python(installed, ask.format(words=["copy", "quickstart_dense", "--to", str(tmp_path)]))
    assert f"accelerate launch {tmp_path}/quickstart_dense.py" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart_dense.py", "quickstart_moe.py"]
    run_it = "import runpy, sys; sys.argv = ['quickstart_dense.py', '--help']; sys.path.insert(0, {folder!r}); "
    run_it += "runpy.run_path({folder!r} + '/quickstart_dense.py', run_name='__main__')"
    assert "run.name" in python(installed, run_it.format(folder=str(tmp_path)))
