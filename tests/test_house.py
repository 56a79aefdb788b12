"""Rules of the whole house: what importing costs, what is public, and what no file may do."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe
import moe_kernels

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("moe", "kernels", "recipes", "scripts") for path in (ROOT / folder).rglob("*.py"))


def loaded_after(statement: str) -> set[str]:
    """Names of the top-level modules a fresh Python holds after `statement`, run at the repository root."""
    code = f"import sys; sys.path[:0] = ['.', 'kernels']; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in result.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    ["import moe", "import moe_kernels", "import moe.cli", "import moe.config", "import moe.accounting"],
)
def test_import_is_light(statement: str) -> None:
    """Importing a package asks for none of the heavy libraries; a name does, when it is used."""
    assert not loaded_after(statement) & {"torch", "plotly", "accelerate", "transformers", "triton", "wandb", "pynvml"}


@pytest.mark.parametrize("package", ["moe.energy", "moe.compare"])
def test_meter_and_comparison_need_no_torch(package: str) -> None:
    """The meter and the comparison work where torch is not installed, and draw charts only when asked."""
    assert not loaded_after(f"import {package}") & {"torch", "plotly", "accelerate", "transformers", "triton"}


def test_trainer_needs_few_libraries() -> None:
    """Training runs on a bare GPU image: torch, accelerate, tokenizers, safetensors, numpy and nvidia-ml-py."""
    blocked = ("transformers", "wandb", "trackio", "tensorboard", "plotly", "typer", "rich", "datasets", "deepspeed")
    blocked += ("scipy", "pandas")
    loaded_after(f"sys.modules.update(dict.fromkeys({blocked!r})); import moe.trainer")


@pytest.mark.parametrize(
    ("package", "name"), [(package.__name__, name) for package in (moe, moe_kernels) for name in package.__all__]
)
def test_public_name_resolves(package: str, name: str) -> None:
    """Every name a package lists can be had from it."""
    assert getattr(importlib.import_module(package), name) is not None


@pytest.mark.parametrize("package", [moe, moe_kernels])
def test_unknown_name_is_an_attribute_error(package: object) -> None:
    """A misspelt name fails the way Python's own modules do."""
    assert not hasattr(package, "no_such_name")


def test_kernels_folder_is_not_a_package() -> None:
    """With an __init__.py it would hide PyPI's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe_in(tree: ast.AST) -> Iterator[str]:
    """Ways to run code that lies in a data file, as `line: what`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name.partition(".")[0] in UNSAFE_MODULES:
                yield f"{node.lineno}: import {name}"  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield f"{node.lineno}: {called}; use yaml.safe_load"
        if options.get("trust_remote_code", "False") != "False":
            yield f"{node.lineno}: trust_remote_code"
        if options.get("allow_pickle", "False") != "False":
            yield f"{node.lineno}: allow_pickle"
        if called in ("eval", "exec"):
            yield f"{node.lineno}: {called}"


def test_no_file_runs_code_from_data() -> None:
    """Weights are safetensors, other state is JSON or weights_only, YAML is safe_load."""
    faults = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in FILES
        for fault in unsafe_in(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_line_is_found(line: str) -> None:
    """The search above sees each of the things it looks for."""
    assert list(unsafe_in(ast.parse(line)))


@pytest.mark.parametrize("line", ["torch.load(path, weights_only=True)", "yaml.safe_load(text)", "json.loads(text)"])
def test_safe_line_passes(line: str) -> None:
    """What the house does instead is not called unsafe."""
    assert not list(unsafe_in(ast.parse(line)))
