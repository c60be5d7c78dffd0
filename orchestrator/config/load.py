"""From a sweep file, or its text, to a `SweepSpec`, or to every problem of it at once.

    spec = read(Path("sweep.yaml"), ["lr=0.1,0.2", "slurm.time=12:00:00"])
    spec = parse(text, file="sweep.yaml")
    json_schema()                               for editors

    yaml12       text to JSON, and the place of every value
    document     that tree, and the problems found in it; W&B's keys that have no place here
    overrides    `key=value` laid over it
    schema       types, by pydantic
    checks       what types can't say; parameters are checked by `orchestrator.config.distributions`
    slurm_options    the `slurm:` section

A problem reads `file:line:column: key: what was found, what is allowed`, or `argument 'key=value': key: ...` when an
override brought it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pydantic

from orchestrator.config.checks import CHECKS, MAX_TRIALS
from orchestrator.config.document import SweepDocument, set_aside
from orchestrator.config.grid import Grid
from orchestrator.config.overrides import override
from orchestrator.config.schema import json_schema, typed
from orchestrator.config.slurm_options import check_slurm
from orchestrator.config.spec import SweepSpec
from orchestrator.config.yaml12 import Document, YamlError
from orchestrator.config.yaml12 import parse as parse_yaml
from orchestrator.core.atomic import JsonObject
from orchestrator.core.text import describe
from orchestrator.errors import SweepFileError

__all__ = ["MAX_TRIALS", "json_schema", "parse", "read"]


def read(path: Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """The sweep of the file at `path`, with `overrides` (`key=value`) laid over it.

    Raises:
        SweepFileError: every problem that there is.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SweepFileError([f"{path}: can't be read: {error.strerror}"]) from None
    return parse(_decoded(data, str(path)), file=str(path), overrides=overrides)


def _decoded(data: bytes, file: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SweepFileError([f"{file}:1:1: UTF-16, expected UTF-8; save the file in that encoding"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, start = data.count(b"\n", 0, error.start) + 1, data.rfind(b"\n", 0, error.start) + 1
        column = len(data[start : error.start].decode()) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise SweepFileError(
            [f"{file}:{line}:{column}: {found} is not UTF-8; save the file in that encoding"]
        ) from None


def parse(text: str, *, file: str = "sweep.yaml", overrides: Sequence[str] = ()) -> SweepSpec:
    """The sweep of a sweep file's text.

    Args:
        text: the file's.
        file: what messages call it; its stem is the name of a sweep that gives none.
        overrides: as of `read`.

    Raises:
        SweepFileError: every problem that there is.
    """
    sheet = SweepDocument(file, _document(text, file), overrides)
    for argument in overrides:
        override(sheet, argument)
    set_aside(sheet)
    sheet.tree.setdefault("name", Path(file).stem)
    found = typed(sheet)
    for check in CHECKS:
        check(sheet)
    check_slurm(sheet, ("slurm",))
    check_slurm(sheet, ("reduce", "slurm"))
    sheet.raise_problems()
    assert found is not None
    spec = _spec(found)
    _check_grid(sheet, spec)
    return spec


def _check_grid(sheet: SweepDocument, spec: SweepSpec) -> None:
    """A grid's size is known only once all else is good."""
    if spec.method == "random" or spec.run_cap is not None:
        return
    size = Grid.of(spec.parameters, spec.zip).size * spec.repeats
    if size > MAX_TRIALS:
        found = f"a grid of {size:,} trials, expected at most {MAX_TRIALS:,}, or run_cap"
        sheet.blame(("parameters",), found, key=True)
        sheet.raise_problems()


def _document(text: str, file: str) -> Document:
    try:
        document = parse_yaml(text)
    except YamlError as error:
        raise SweepFileError([f"{file}:{error.place.line}:{error.place.column}: {error}"]) from None
    if document.value is None and not document.problems:
        raise SweepFileError([f"{file}:1:1: the file is empty, expected method, parameters, and program or command"])
    if document.value is not None and not isinstance(document.value, dict):
        place = document.places[()].value
        found = f"found {describe(document.value)}, expected a mapping with method, parameters, and program or command"
        raise SweepFileError([f"{file}:{place.line}:{place.column}: {found}"])
    return document


def _spec(found: pydantic.BaseModel) -> SweepSpec:
    default = SweepSpec(name="", method="grid", parameters={}).to_json()
    spec = SweepSpec.from_json(_filled(found.model_dump(mode="json"), default))
    if spec.program is None or spec.command is None:
        return spec
    return replace(spec, program=None, command=tuple(a.replace("${program}", spec.program) for a in spec.command))


def _filled(value: JsonObject, default: JsonObject) -> JsonObject:
    """`value`, sections within it too, with the default where there is null."""
    filled = dict(value)
    for key, item in value.items():
        known = default.get(key)
        if item is None:
            filled[key] = known
        elif isinstance(item, dict) and isinstance(known, dict):
            filled[key] = _filled(item, known)
    return filled
