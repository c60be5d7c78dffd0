"""The house: which module may import which, read from the source. A new module needs a row here."""

from __future__ import annotations

import ast
import itertools
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"

# A room may import the rooms above it, and those beside it where that makes no circle. A folder is one room.
HOUSE = [
    "errors wording signals",  # the tree of errors; texts; signals as data
    "paths store trust",  # every file name; durable files; other users
    "yaml12 space spec procfs identity processes guardian seat devices vitals exact scratch",  # words; processes
    "sweepfile signatures plan render sketch ranking tree",  # pure: file text, plan, script text
    "reading limbs cells samples summary algebra wire metrics",  # pure: the monoid, and those made of it
    "records claims fold objective models effects curves resumption",  # outcomes, join, merge; what is kept
    "reduction parts share",  # ranges of trials that reducers merge
    "code job slurm local ledger leftovers handover submit",  # the user's code; Slurm's commands; submissions
    "channel source reports command attempt requeue notices reducer pace course budgets",  # what runs, free of torch
    "augment loading sampling losses readers",  # samples and what is made of them; with torch, as the next two rows
    "data precision values aside hessian settings dist statetree checkpoint capture saver",  # only these have torch
    "roll meeting replica agreement concord team diagnostics rank keeper trial worker",
    "kernels members stack optimizers pack packer rendezvous ranks elastic",
    "forkserver children crew outposts outpost supervisor",  # what Slurm starts; workers are its children
    "intake sweep lab show watch tending running preview logs examples cli",  # what a person calls
    "__init__ __main__",
]
ROW = {room: row for row, rooms in enumerate(HOUSE) for room in rooms.split()}

TORCH = {
    "augment",
    "loading",
    "sampling",
    "losses",
    "readers",
    "data",
    "precision",
    "values",
    "aside",
    "hessian",
    "diagnostics",
    "settings",
    "dist",
    "statetree",
    "checkpoint",
    "capture",
    "saver",
    "roll",
    "meeting",
    "replica",
    "agreement",
    "concord",
    "team",
    "rank",
    "elastic",
    "keeper",
    "trial",
    "worker",
    "members",
    "stack",
    "optimizers",
    "kernels",
    "pack",
    "packer",
    "rendezvous",
    "ranks",
}
HEAVY = {"torch", "numpy", "pandas", "pydantic", "jinja2", "optuna", "matplotlib", "sklearn", "submitit"}
# These in turn, and what imports them at once, are imported inside functions only.
ALLOWED: dict[str, set[str]] = {
    "sweepfile": {"pydantic"},
    "samples": {"numpy"},
    "limbs": {"numpy"},
    "cells": {"numpy"},
    "intake": set(),
}
SLURM_CALLERS = {"slurm", "lab"}
SLURM_COMMANDS = {"sbatch", "squeue", "scancel", "scontrol", "sacct", "sacctmgr", "sinfo", "srun"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def inner_imports(path: Path) -> set[str]:
    """Rooms that a module imports, at any depth, for types too."""
    names = itertools.chain.from_iterable(map(targets, ast.walk(tree_of(path))))
    return {name.split(".")[1] for name in names if name.startswith("orchestrator.")} - {room_of(path), "__version__"}


def at_module_level(path: Path, *, whole: bool = False) -> set[str]:
    """Top names (or whole ones) that a module imports when it is imported: not in functions, nor for types only."""

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

    return {name if whole else name.split(".")[0] for name in walk(tree_of(path).body)}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_a_room_imports_only_rooms_above_or_beside_it(path: Path) -> None:
    room = room_of(path)
    assert room in ROW, f"{room} has no row in the house; give it one in HOUSE"
    below = {other for other in inner_imports(path) if ROW.get(other, len(HOUSE)) > ROW[room]}
    assert not below, f"{room} imports {', '.join(sorted(below))}, which is below it"


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        graph.setdefault(room_of(path), set()).update(inner_imports(path))
    while graph:
        free = [room for room, imports in graph.items() if not imports & graph.keys()]
        assert free, f"a circle among {', '.join(sorted(graph))}"
        for room in free:
            del graph[room]


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_nothing_heavy_is_imported_where_commands_start(path: Path) -> None:
    allowed = HEAVY if room_of(path) in TORCH else ALLOWED.get(room_of(path), set())
    assert not at_module_level(path) & (HEAVY - allowed)


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_what_imports_a_heavy_room_does_so_inside_functions(path: Path) -> None:
    rooms = {name.split(".")[1] for name in at_module_level(path, whole=True) if name.startswith("orchestrator.")}
    heavy = TORCH | ALLOWED.keys()
    assert room_of(path) in heavy or not rooms & heavy


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_only_one_room_calls_slurm_s_commands(path: Path) -> None:
    lists = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.List | ast.Tuple) and node.elts]
    heads = {node.elts[0].value for node in lists if isinstance(node.elts[0], ast.Constant)}
    called = {head for head in heads if isinstance(head, str)} & SLURM_COMMANDS
    assert room_of(path) in SLURM_CALLERS or not called


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_no_module_is_named_for_nothing(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_no_function_is_longer_than_sixty_lines(path: Path) -> None:
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno and f.end_lineno - f.lineno >= 60}
    assert not long
