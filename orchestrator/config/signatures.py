"""What a job's functions take, read without importing it.

    signatures = check("train.py", {"lr", "epochs"}, folder)     raises ProgramError when they don't fit
    for_build, for_train = split(params, module.build, module.train)

A program is `train.py`, `train.py:function` or `package.module:function`, relative to the sweep file's folder. The
function (`train`, if none is named) is called with the trial first and the sweep's parameters by keyword; a top-level
function `build` beside it takes parameters too. Where the source is out of sight, or a name is not bound by a plain
`def`, nothing is checked here, and the job's own import has the last word.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.atomic import Json
from orchestrator.core.text import did_you_mean
from orchestrator.errors import ProgramError

__all__ = ["Function", "Signatures", "check", "read_signatures", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """The keyword parameters of one function.

    Args:
        name: its name.
        line: where it is defined.
        required: parameters without a default.
        optional: parameters with one.
        takes_any: whether it has `**kwargs`, or a decorator that may change what it takes.
    """

    name: str
    line: int
    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_any: bool

    def takes(self, parameter: str) -> bool:
        """Whether it can be called with this parameter."""
        return self.takes_any or parameter in self.required or parameter in self.optional


@dataclass(frozen=True, slots=True, kw_only=True)
class Signatures:
    """The functions of a job.

    Args:
        file: where they are.
        train: what runs a trial; its first parameter, the trial, is left out.
        build: what makes network and optimizer, if there is a top-level `build`.
    """

    file: Path
    train: Function
    build: Function | None

    @property
    def functions(self) -> tuple[Function, ...]:
        """Those that there are, in the order in which a reader meets them."""
        return (self.train,) if self.build is None else (self.build, self.train)


def check(program: str, parameters: Collection[str], folder: Path) -> Signatures | None:
    """Check that every parameter is taken by a function of the job, and that every required argument is given.

    Args:
        program: as in a sweep file.
        parameters: names of the sweep's parameters, of nested ones the outermost.
        folder: the sweep file's.

    Returns:
        What was read; None where it can't be known without importing.

    Raises:
        ProgramError: all that doesn't fit; or there is no such file or function, or it isn't Python.
    """
    signatures = read_signatures(program, folder)
    if signatures is not None:
        problems = [*_untaken(signatures, parameters), *_not_given(signatures, parameters)]
        if problems:
            raise ProgramError("\n".join(problems))
    return signatures


def _untaken(signatures: Signatures, parameters: Collection[str]) -> Iterator[str]:
    functions = signatures.functions
    known = [name for function in functions for name in (*function.required, *function.optional)]
    for name in parameters:
        if not any(function.takes(name) for function in functions):
            where = " and ".join(f"{function.name} (line {function.line})" for function in functions)
            takes = f"take {', '.join(dict.fromkeys(known))}" if known else "take none"
            guess = did_you_mean(name, known)
            yield f"{signatures.file}: parameter {name!r} is not taken: {where} {takes}{guess}"


def _not_given(signatures: Signatures, parameters: Collection[str]) -> Iterator[str]:
    for function in signatures.functions:
        for name in function.required:
            if name not in parameters:
                what = f"{function.name} needs {name!r}, which is not among the sweep's parameters"
                remedy = f"add it as parameters.{name}, or give it a default"
                yield f"{signatures.file}:{function.line}: {what}; {remedy}"


def read_signatures(program: str, folder: Path) -> Signatures | None:
    """The signatures of `program`; None where they can't be known without importing.

    Raises:
        ProgramError: as `check`.
    """
    target, _, name = program.partition(":")
    file = folder / target if target.endswith(".py") else _module_file(target, folder)
    if file is None:
        return None
    tree = _parsed(file)
    name = name or "train"
    defined = dict(_definitions(tree.body))
    train = _found(defined, name, file, target)
    if train is None:
        return None
    build = defined.get("build") if name != "build" else None
    return Signatures(
        file=file,
        train=_function(train, skip_first=True),
        build=_build(build, tree) if isinstance(build, ast.FunctionDef) else None,
    )


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), str(file))
    except FileNotFoundError:
        names = sorted(path.name for path in file.parent.glob("*.py"))
        raise ProgramError(f"{file}: no such file{did_you_mean(file.name, names)}") from None
    except OSError as error:
        raise ProgramError(f"{file}: can't be read: {error.strerror}") from None
    except SyntaxError as error:
        raise ProgramError(f"{file}:{error.lineno or 1}:{error.offset or 1}: not Python: {error.msg}") from None
    except ValueError as error:
        raise ProgramError(f"{file}: not Python: {error}") from None


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Every name bound at the top level, with what binds it; a later binding comes later."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
        else:
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from _definitions(_statements(getattr(node, part, [])))


def _statements(nodes: list[ast.stmt | ast.ExceptHandler]) -> list[ast.stmt]:
    inner = [node.body if isinstance(node, ast.ExceptHandler) else [node] for node in nodes]
    return [node for body in inner for node in body]


def _found(defined: dict[str, ast.stmt], name: str, file: Path, target: str) -> ast.FunctionDef | None:
    node = defined.get(name)
    if isinstance(node, ast.FunctionDef):
        return node
    if isinstance(node, ast.AsyncFunctionDef):
        raise ProgramError(f"{file}:{node.lineno}: {name} is async, expected a plain function")
    if node is not None or "*" in defined:
        return None
    functions = [key for key, each in defined.items() if isinstance(each, ast.FunctionDef)]
    guess = did_you_mean(name, functions)
    remedy = (
        "" if guess else f"; to run the file as a script, give command: [python, {target}, '${{args}}'] for program"
    )
    raise ProgramError(f"{file}: no function {name!r}{guess}{remedy}")


def _function(node: ast.FunctionDef, *, skip_first: bool) -> Function:
    arguments = node.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    num_required = len(positional) - len(arguments.defaults)
    required, optional = positional[:num_required], positional[num_required:]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        (optional if default is not None else required).append(argument.arg)
    if skip_first and positional:
        required, optional = [n for n in required if n != positional[0]], [n for n in optional if n != positional[0]]
    takes_any = arguments.kwarg is not None or bool(node.decorator_list)
    # A decorator may fill arguments in.
    needs = () if node.decorator_list else tuple(required)
    return Function(name=node.name, line=node.lineno, required=needs, optional=tuple(optional), takes_any=takes_any)


def _build(node: ast.FunctionDef, tree: ast.Module) -> Function:
    """`build`; one that is never handed to `trial.build` may be a helper, of which nothing is required."""
    function = _function(node, skip_first=False)
    if any(_hands_over_build(each) for each in ast.walk(tree)):
        return function
    optional = (*function.required, *function.optional)
    return Function(name="build", line=function.line, required=(), optional=optional, takes_any=function.takes_any)


def _hands_over_build(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "build"):
        return False
    return any(isinstance(argument, ast.Name) and argument.id == "build" for argument in node.args)


def _module_file(module: str, folder: Path) -> Path | None:
    """Source of a module, found without importing its parents: beside the sweep file, or where its package is."""
    top, *inner = module.split(".")
    for root in _package_roots(top, folder):
        base = root.joinpath(*inner)
        for file in (base / "__init__.py", base.with_name(base.name + ".py")):
            if file.is_file():
                return file
    return None


def _package_roots(top: str, folder: Path) -> Iterator[Path]:
    from importlib.util import find_spec

    yield folder / top
    try:
        # Of a name without dots this runs no code of the package.
        spec = find_spec(top)
    except (ImportError, ValueError):
        return
    if spec is not None and spec.submodule_search_locations is not None:
        yield from map(Path, spec.submodule_search_locations)
    elif spec is not None and spec.origin is not None:
        yield Path(spec.origin).with_suffix("")


def split(
    params: dict[str, Json], build: Callable[..., object] | None, train: Callable[..., object]
) -> tuple[dict[str, Json], dict[str, Json]]:
    """The parameters that `build` takes, and those that `train` takes after the trial; what both take goes to both.

    Raises:
        ProgramError: a parameter that neither takes.
    """
    for_build = {} if build is None else _taken(params, build, skip_first=False)
    for_train = _taken(params, train, skip_first=True)
    lost = [name for name in params if name not in for_build and name not in for_train]
    if lost:
        raise ProgramError(
            f"neither build nor {getattr(train, '__name__', 'train')} takes {', '.join(map(repr, lost))}"
        )
    return for_build, for_train


def _taken(params: dict[str, Json], function: Callable[..., object], *, skip_first: bool) -> dict[str, Json]:
    from inspect import Parameter, signature

    found = list(signature(function).parameters.values())[int(skip_first) :]
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in found):
        return dict(params)
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in found if parameter.kind in by_name}
    return {name: value for name, value in params.items() if name in names}
