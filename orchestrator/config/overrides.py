"""`key=value` laid over a sweep file.

A key is a path from the top of the file (`metric.goal`, `slurm.time`), or the dotted name of a parameter that the file
has (`lr`, `optimizer.lr`), or that name and one of the parameter's keys (`lr.max`). Where both could be meant, it is
the top of the file: a parameter called `seed` is reached as `parameters.seed`. A value is YAML; `0.1,0.2` is a list,
and for a parameter its `values`; `[64, 64]` is one value that is a list.
"""

from __future__ import annotations

from dataclasses import fields
from typing import cast

from orchestrator.config.document import HARMLESS, REFUSED, SweepDocument, parameter_paths
from orchestrator.config.spec import SweepSpec
from orchestrator.config.yaml12 import YamlError, parse
from orchestrator.core.atomic import Json
from orchestrator.core.text import did_you_mean

__all__ = ["override"]


def override(sheet: SweepDocument, argument: str) -> None:
    """Lay `argument` over the sheet, or note what is wrong with it."""
    key, equals, text = argument.partition("=")
    if not equals or not key:
        return sheet.blame_argument(argument, "expected key=value")
    try:
        # The line break ends a comment; as items of a list, what stands between commas is read by the file's own rules.
        document = parse(f"[{text}\n]")
    except YamlError as error:
        return sheet.blame_argument(argument, f"{error}; quote the value if it holds YAML's own characters")
    for _, _, problem in document.problems:
        sheet.blame_argument(argument, problem)
    items = cast("list[Json]", document.value)
    several = len(items) > 1 or text.rstrip().endswith(",")
    return _place_override(sheet, argument, key, items if several else items[0] if items else None, several=several)


def _place_override(sheet: SweepDocument, argument: str, key: str, value: Json, *, several: bool) -> None:
    known = dict(parameter_paths(sheet.tree.get("parameters"), ("parameters",)))
    name = key.removeprefix("parameters.")
    top = {f.name for f in fields(SweepSpec)} | {*HARMLESS, *(path[0] for path in REFUSED)}
    first = key.partition(".")[0]
    if name in known and (first == "parameters" or first not in top):
        config: Json = value if isinstance(value, dict) else {"values" if several else "value": value}
        return sheet.override(known[name], config, argument)
    inner, _, last = name.rpartition(".")
    if inner in known and (first == "parameters" or first not in top):
        return sheet.override((*known[inner], last), value, argument)
    if first in top:
        return sheet.override(tuple(key.split(".")), value, argument)
    guess = did_you_mean(key, [*known, *map(str, top)])
    return sheet.blame_argument(
        argument, f"no key or parameter {key!r}{guess or '; to add one, give parameters.NAME.value'}"
    )
