"""The house: which room may import which, read from the source."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"

# Rooms by what they may import beside themselves and `errors`; what stands at the top of the package may import all.
ROOMS = {
    "core": set(),
    "config": {"core"},
    "stats": {"core"},
    "results": {"core", "config", "stats"},
    "slurm": {"core", "config", "results"},
    "distributed": {"core", "stats"},
    "training": {"core", "config", "stats", "results", "distributed"},
    "worker": {"core", "config", "stats", "results", "distributed", "training"},
    "supervisor": {"core", "config", "results", "slurm", "worker"},  # of worker, what is free of torch
    "cli": {"core", "config", "stats", "results", "slurm", "distributed", "training", "worker", "supervisor", "sweep"},
}
TOP = {"__init__", "__main__", "errors", "sweep"}

TORCH_ROOMS = {"distributed", "training", "worker"}
HEAVY = {"torch", "numpy", "pandas", "pydantic", "jinja2", "optuna", "matplotlib", "sklearn", "submitit"}
# What a module outside of those rooms loads at once; others import it inside functions.
ALLOWED: dict[str, set[str]] = {
    "config.load": {"pydantic"},
    "config.schema": {"pydantic"},
    "cli.prepare": {"pydantic"},
    "stats.batch": {"numpy"},
    "stats.exact_numpy": {"numpy"},
    "stats.bucket_counts": {"numpy"},
}
SLURM_CALLERS = {"slurm.commands", "slurm.lab"}
SLURM_COMMANDS = {"sbatch", "squeue", "scancel", "scontrol", "sacct", "sacctmgr", "sinfo", "srun"}
MOST_NAMES, MOST_FILES = 16, 15


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`slurm.lab` for orchestrator/slurm/lab/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in modules()}


def room_of(path: Path) -> str:
    return name_of(path).split(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def targets(node: ast.AST) -> list[str]:
    """Full names of what an import statement may load; those of `from package import name` include the name."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def ours(names: Iterable[str]) -> set[str]:
    """The modules of this package among what is imported, without the package's name."""
    inner = {name.removeprefix("orchestrator.") for name in names if name.startswith("orchestrator.")}
    return {name if name in NAMES else name.rpartition(".")[0] for name in inner} - {"", "__version__"}


def inner_imports(path: Path) -> set[str]:
    """Modules of this package that a module imports, at any depth, for types too."""
    return ours(itertools.chain.from_iterable(map(targets, ast.walk(tree_of(path)))))


@cache
def at_module_level(path: Path) -> frozenset[str]:
    """What a module imports when it is imported: not in functions, nor for types only."""

    def walk(nodes: list[ast.stmt]) -> list[str]:
        found = []
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                found += walk(node.orelse)
                continue
            found += targets(node) + walk(
                [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            )
        return found

    return frozenset(walk(tree_of(path).body))


@cache
def loaded(name: str) -> frozenset[str]:
    """The heavy packages that come with a module when it is imported, by whatever way."""
    seen: set[str] = set()
    left, heavy = [name], set()
    while left:
        module = left.pop()
        if module in seen or module not in NAMES:
            continue
        seen.add(module)
        names = at_module_level(NAMES[module])
        heavy |= {other.split(".")[0] for other in names} & HEAVY
        left += [*ours(names), module.rpartition(".")[0]]
    return frozenset(heavy)


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


each_module = pytest.mark.parametrize("path", modules(), ids=ids(modules()))


@each_module
def test_a_room_imports_only_the_rooms_of_its_row(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS or room in TOP or not room, f"{room} is no room; give it a row in ROOMS"
    if room in ROOMS:
        others = {name.split(".")[0] for name in inner_imports(path)} - {room, "errors"}
        assert others <= ROOMS[room], f"{room} may not import {', '.join(sorted(others - ROOMS[room]))}"


def test_there_is_no_circle() -> None:
    graph = {name: inner_imports(path) - {name} for name, path in NAMES.items()}
    while graph:
        free = [name for name, imports in graph.items() if not imports & graph.keys()]
        assert free, f"a circle among {', '.join(sorted(graph))}"
        for name in free:
            del graph[name]


@each_module
def test_torch_and_other_heavy_packages_load_only_where_they_are_used(path: Path) -> None:
    name = name_of(path)
    if room_of(path) not in TORCH_ROOMS:
        assert loaded(name) <= ALLOWED.get(name, set()) if name else not loaded(name)


@each_module
def test_only_one_place_calls_slurm_s_commands(path: Path) -> None:
    lists = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.List | ast.Tuple) and node.elts]
    heads = {node.elts[0].value for node in lists if isinstance(node.elts[0], ast.Constant)}
    called = {head for head in heads if isinstance(head, str)} & SLURM_COMMANDS
    assert not called or any(name_of(path) == name or name_of(path).startswith(f"{name}.") for name in SLURM_CALLERS)


def test_every_folder_is_small_enough_to_be_looked_through() -> None:
    top = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(top) <= MOST_NAMES
    counts = Counter(path.parent for path in modules())
    assert {str(folder.relative_to(PACKAGE)): n for folder, n in counts.items() if n > MOST_FILES} == {}


@each_module
def test_no_module_is_named_for_nothing(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


@each_module
def test_no_function_is_longer_than_sixty_lines(path: Path) -> None:
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno and f.end_lineno - f.lineno >= 60}
    assert not long


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in modules():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name_of(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
