"""`moe recipe`: the recipes that come with the package, for those who have no checkout; list them, copy one."""

import ast
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

import moe
from moe.config.fields import nearest
from moe.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """List the recipes that come with the package; copy one."""


@app.command("list")
def list_command() -> None:
    """List the recipes, and the configurations of `accelerate launch` under launch/, each with its first line."""
    for name, path in sorted(_recipes().items(), key=lambda item: ("/" in item[0], item[0])):
        print(f"{name:<24} {_first_line(path)}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="As `moe recipe list` prints it.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to copy it into.")] = Path("."),
) -> None:
    """Copy a recipe, with the recipes it imports, and print how to launch it. Nothing is overwritten."""
    recipes = _recipes()
    name = name.removesuffix(".py").removesuffix(".yaml")
    if name not in recipes:
        raise ConfigError(f"{name!r} is not a recipe{nearest(name, recipes)}")
    files = {to / path.relative_to(_folder()): path for path in _with_imports(recipes[name])}
    first = next(iter(files))
    for target, path in files.items():
        if target.exists() and (target == first or target.read_bytes() != path.read_bytes()):
            raise ConfigError(f"{target} exists and is not overwritten; give another folder with --to DIR")
    try:
        for target, path in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            print(f"written: {target}")
    except OSError as error:
        raise ConfigError(f"--to {to} cannot be written ({error.strerror}); give another folder") from None
    words = ["--config_file", str(first), "RECIPE.py"] if first.suffix == ".yaml" else [str(first), "run.name=mine"]
    print(f"launch with: accelerate launch {shlex.join(words)}")


def _folder() -> Path:
    """Where recipes lie: in the installed package, or beside it in a checkout."""
    package = Path(moe.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _recipes() -> dict[str, Path]:
    """Name -> file: `quickstart_moe`, `launch/ddp`."""
    folder = _folder()
    paths = [*folder.glob("*.py"), *folder.glob("launch/*.yaml")]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _first_line(path: Path) -> str:
    """Of a recipe's docstring, or of a configuration's opening comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return text.partition("\n")[0].lstrip("# ")


def _with_imports(path: Path) -> list[Path]:
    """The file, then the recipes it imports, and those they import."""
    found = [path]
    for file in found:
        if file.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            beside = (file.with_name(f"{name}.py") for name in names)
            found += [other for other in beside if other.is_file() and other not in found]
    return found
