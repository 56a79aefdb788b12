"""Imports point one way: every file under moe/ and kernels/moe_kernels has a layer, and uses only layers below it.

An import counts as runtime (module level, or lazily inside a function) or as typing-only (under `if TYPE_CHECKING`).
Runtime imports obey the order; typing-only imports may point upwards where `TYPING_UPWARDS` lists them. No imports of
any kind close a cycle between files.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"moe": ROOT / "moe", "moe_kernels": ROOT / "kernels" / "moe_kernels"}

# Bottom to top. A unit may import units of its own group and of lower lines; groups on one line do not know each other.
ORDER: tuple[tuple[set[str], ...], ...] = (
    ({"moe"},),  # moe/__init__.py: everything it exports is loaded by name, when asked for
    ({"moe.errors"},),
    ({"moe_kernels"}, {"moe.energy"}),
    ({"moe.rundir", "moe.config", "moe.accounting"},),
    ({"moe.balance", "moe.parallel", "moe.parallel.ranks", "moe.parallel.clipping", "moe.parallel.all_to_all"},),
    ({"moe.layers"},),
    ({"moe.cache", "moe.generate"},),  # below the model, whose generate() is a method
    ({"moe.model"},),
    ({"moe.balancer", "moe.data", "moe.optim", "moe.replay", "moe.schedule", "moe.checkpoint"},),
    ({"moe.parallel.engine", "moe.tracking", "moe.branch"},),
    ({"moe.parallel.zero", "moe.parallel.launch"},),
    ({"moe.trainer"}, {"moe.compare"}, {"moe.hf"}, {"moe.runs"}, {"moe.disclosure"}),
    ({"moe.cli"},),
)
# Units that see less than the order would let them.
ONLY: dict[str, set[str]] = {
    "moe_kernels": set(),
    "moe.energy": {"moe.errors"},
    "moe.compare": {"moe.rundir", "moe.energy", "moe.accounting", "moe.config", "moe.errors"},
    "moe.runs": {"moe.rundir", "moe.energy", "moe.accounting", "moe.config", "moe.errors"},
    "moe.disclosure": {"moe.rundir", "moe.energy", "moe.accounting", "moe.config", "moe.errors"},
}
# Typing-only imports that point upwards: (file, what it names).
TYPING_UPWARDS: set[tuple[str, str]] = set()
# Units that must start without torch: no file of theirs imports it when loaded.
NO_TORCH = {
    "moe",
    "moe.errors",
    "moe.energy",
    "moe.rundir",
    "moe.config",
    "moe.accounting",
    "moe.compare",
    "moe.cli",
    "moe.runs",
    "moe.disclosure",
}

PLACE = {
    unit: (line, group) for line, groups in enumerate(ORDER) for group, units in enumerate(groups) for unit in units
}


class Import(NamedTuple):
    """`source` imports `target` (full module names); `kind` is 'module', 'lazy' or 'typing'."""

    source: str
    target: str
    kind: str
    line: int


def modules() -> dict[str, Path]:
    """Every module of the house by its full name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def unit_of(module: str) -> str | None:
    """The longest listed name that `module` is or lies in; None for a file nobody gave a place."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in PLACE and (name not in ("moe", "moe.parallel") or end == len(parts)):
            return name
    return None


def imports_of(module: str, path: Path) -> list[Import]:
    """All imports of a file, those of other projects included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    known = modules()

    def targets(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                exported = base == "moe" and alias.name != "__version__"  # a name moe/__init__.py would load for us
                yield full if full in known or exported else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))

    def walk(node: ast.AST, kind: str) -> Iterator[Import]:
        for target in dict.fromkeys(targets(node)):
            yield Import(module, target, kind, getattr(node, "lineno", 0))
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.body:
                yield from walk(statement, "typing")
            for statement in node.orelse:
                yield from walk(statement, kind)
            return
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, "lazy" if inside and kind == "module" else kind)

    return list(walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), "module"))


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [found for module, path in modules().items() for found in imports_of(module, path)]


def in_house(found: Import) -> bool:
    return found.target.partition(".")[0] in PACKAGES and found.target in modules()


def fault_of(found: Import) -> str | None:
    """What is wrong with an import between two placed modules, in one line; None when nothing is."""
    source, target = unit_of(found.source), unit_of(found.target)
    if source is None or target is None or source == target or target == "moe":
        return None
    if found.kind == "typing" and (found.source, found.target) in TYPING_UPWARDS:
        return None
    (source_line, source_group), (target_line, target_group) = PLACE[source], PLACE[target]
    same_group = (source_line, source_group) == (target_line, target_group)
    where = f"{found.source} line {found.line} ({found.kind}) imports {found.target}"
    if source in ONLY and target not in ONLY[source]:
        return f"{where}: {source} may use only {', '.join(sorted(ONLY[source])) or 'itself'}"
    if not same_group and target_line >= source_line:
        return f"{where}: {target} is not below {source}"
    return None


def cycle_in(edges: dict[str, set[str]]) -> list[str]:
    """One cycle as the names along it, empty when there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for following in sorted(edges.get(name, ())):
            if found := visit(following, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def edges_of(pairs: Iterator[tuple[str, str]]) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for source, target in pairs:
        if source != target:
            edges.setdefault(source, set()).add(target)
    return edges


@pytest.mark.parametrize(
    ("source", "target", "kind", "allowed"),
    [
        ("moe.model", "moe.layers.router", "module", True),
        ("moe.layers.router", "moe.model", "lazy", False),
        ("moe.layers.router", "moe.model", "typing", False),
        ("moe.config.twin", "moe.accounting", "module", True),
        ("moe.energy.meter", "moe.rundir", "module", False),
        ("moe.energy.meter", "moe_kernels", "module", False),
        ("moe_kernels.gemm", "moe.errors", "module", False),
        ("moe.compare.runs", "moe.energy", "module", True),
        ("moe.compare.runs", "moe.model", "lazy", False),
        ("moe.hf.load", "moe.trainer.loop", "lazy", False),
        ("moe.hf.load", "moe.balancer", "module", True),
        ("moe.parallel.engine", "moe.model", "module", True),
        ("moe.layers.experts", "moe.parallel.engine", "module", False),
        ("moe.cli.compare", "moe.compare", "lazy", True),
    ],
)
def test_the_order_says(source: str, target: str, kind: str, allowed: bool) -> None:
    """The table above means what it should."""
    assert (fault_of(Import(source, target, kind, 1)) is None) is allowed


def test_every_module_has_a_place() -> None:
    """A new file belongs to a layer, or the order no longer says anything about it."""
    homeless = [module for module in modules() if unit_of(module) is None]
    assert not homeless, f"give it a place in ORDER of {Path(__file__).name}: {', '.join(homeless)}"


def test_imports_point_downwards(imports: list[Import]) -> None:
    """Runtime and typing imports follow the order; what is allowed to point up for types is listed."""
    faults = [fault for found in imports if in_house(found) and (fault := fault_of(found))]
    assert not faults, "\n".join(faults)


def test_listed_typing_imports_exist(imports: list[Import]) -> None:
    """The list of upward typing imports holds none that is gone."""
    present = {(found.source, found.target) for found in imports if found.kind == "typing"}
    assert not TYPING_UPWARDS - present


def test_no_cycle_between_units(imports: list[Import]) -> None:
    """Neither module-level nor lazy imports lead from a unit back to itself."""
    runtime = [found for found in imports if in_house(found) and found.kind != "typing"]
    units = ((unit_of(found.source) or found.source, unit_of(found.target) or found.target) for found in runtime)
    assert not cycle_in(edges_of((source, target) for source, target in units if "moe" not in (source, target)))


def test_no_cycle_between_files(imports: list[Import]) -> None:
    """No file needs, while loading, later or for its types, a file that needs it."""
    assert not cycle_in(edges_of((found.source, found.target) for found in imports if in_house(found)))


def test_imported_house_modules_exist(imports: list[Import]) -> None:
    """A lazy import of a file that was renamed fails here, not in front of a user; so does `from moe import Name`."""
    missing = [
        f"{found.source} line {found.line}: there is no module {found.target}"
        for found in imports
        if found.target.partition(".")[0] in PACKAGES and found.target not in modules()
    ]
    assert not missing, "\n".join(missing)


def test_light_units_load_without_torch(imports: list[Import]) -> None:
    """The command line, the meter and the comparison start in half a second: loading them loads no torch."""
    edges = edges_of((found.source, found.target) for found in imports if found.kind == "module")
    for module in modules():
        package = module.rpartition(".")[0]
        edges.setdefault(module, set()).update({package} - {""})  # a file loads the package it lies in

    def reached(module: str) -> set[str]:
        seen, ahead = set(), [module]
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead.extend(edges.get(name, ()))
        return {name.partition(".")[0] for name in seen}

    faults = {
        module: heavy
        for module in modules()
        if unit_of(module) in NO_TORCH and (heavy := reached(module) & {"torch", "accelerate", "transformers"})
    }
    assert not faults
