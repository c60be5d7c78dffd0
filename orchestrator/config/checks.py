"""What pydantic's types can't say: names, programs, parameters, and keys that must agree with each other."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import cast

from orchestrator.config.distributions import ENUMERABLE, NAME, faults, infer, same
from orchestrator.config.document import SweepDocument, parameter_paths
from orchestrator.config.spec import Interval
from orchestrator.config.yaml12 import Path
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.text import describe, did_you_mean, nearest

__all__ = ["CHECKS", "EVERY", "MAX_TRIALS", "PROGRAM", "SWEEP_NAME"]

MAX_TRIALS = 10_000_000
"""More than this is taken for a mistake: a grid with one parameter too many."""

SWEEP_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
PROGRAM = r"[^:\0\n]+\.py(:[^\W\d]\w*)?|[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"
EVERY = r"auto|off|epoch|[0-9]+(\.[0-9]+)? ?[smh]|[0-9]+ ?(steps?|epochs?)"
_MACROS = (
    "env",
    "interpreter",
    "program",
    "args",
    "args_no_boolean_flags",
    "args_no_hyphens",
    "args_json",
    "args_json_file",
)


def _check_name(sheet: SweepDocument) -> None:
    name = sheet.tree["name"]
    if isinstance(name, str) and not re.fullmatch(SWEEP_NAME, name):
        allowed = "expected 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot or a dash"
        sheet.blame(("name",), f"found {describe(name)}, {allowed}")


def _check_program(sheet: SweepDocument) -> None:
    program, command = sheet.tree.get("program"), sheet.tree.get("command")
    if program is None and command is None:
        sheet.blame((), "neither program nor command is given, expected one of them")
    if isinstance(program, str) and not re.fullmatch(PROGRAM, program):
        expected = "train.py, train.py:function or package.module:function; anything else that can run is a command"
        sheet.blame(("program",), f"found {describe(program)}, expected {expected}")
    if isinstance(command, list):
        _check_command(sheet, command, program)


def _check_command(sheet: SweepDocument, command: list[Json], program: Json) -> None:
    if not command:
        sheet.blame(("command",), "found an empty list, expected a program and its arguments")
    words = [word for word in command if isinstance(word, str)]
    uses_program = any("${program}" in word for word in words)
    if program is not None and command and not uses_program:
        sheet.blame(
            ("command",), "command and program are both given, expected one of them, or ${program} in command", key=True
        )
    if program is None and uses_program:
        sheet.blame(("command",), "${program} is used and there is no program; name the file instead")
    for i, word in enumerate(command):
        # Other ${...} are left to whatever runs: `bash -c` has its own.
        for macro in re.findall(r"\$\{(\w+)\}", word) if isinstance(word, str) else ():
            near = nearest(macro, _MACROS, cutoff=0.8)
            if near and macro not in _MACROS:
                sheet.blame(("command", i), f"unknown macro ${{{macro}}}; did you mean '${{{near}}}'?")


def _check_parameters(sheet: SweepDocument) -> None:
    parameters = sheet.tree.get("parameters")
    if isinstance(parameters, dict):
        _check_group(sheet, parameters, ("parameters",), (), Counter())


def _check_group(
    sheet: SweepDocument, group: JsonObject, path: Path, above: tuple[str, ...], seen: Counter[str]
) -> None:
    if not group:
        sheet.blame(path, "found an empty mapping, expected at least one parameter")
    for name, config in group.items():
        here, dotted = (*path, name), (*above, name)
        seen[".".join(dotted)] += 1
        if not re.fullmatch(NAME, name):
            sheet.blame(
                here, "not a parameter's name, expected letters, digits, _ . -, beginning with a letter or _", key=True
            )
        elif seen[".".join(dotted)] > 1:
            sheet.blame(here, f"two parameters are called {'.'.join(dotted)}", key=True)
        if not isinstance(config, dict):
            sheet.blame(here, f"found {describe(config)}, expected a mapping, such as {{value: {_short(config)}}}")
        elif "parameters" in config:
            _check_nested(sheet, config, here, dotted, seen)
        else:
            _check_parameter(sheet, config, here)


def _short(config: Json) -> str:
    return "0.1" if config is None or isinstance(config, list) else json.dumps(config)


def _check_nested(
    sheet: SweepDocument, config: JsonObject, path: Path, above: tuple[str, ...], seen: Counter[str]
) -> None:
    for key in config:
        if key != "parameters":
            sheet.blame((*path, key), "a parameter with nested parameters has no other key", key=True)
    inner = config["parameters"]
    if isinstance(inner, dict):
        _check_group(sheet, inner, (*path, "parameters"), above, seen)
    else:
        sheet.blame((*path, "parameters"), f"found {describe(inner)}, expected a mapping")


def _check_parameter(sheet: SweepDocument, config: JsonObject, path: Path) -> None:
    found = faults(config)
    for fault in found:
        sheet.blame((*path, *fault.path), fault.text, key=fault.key)
    if found or sheet.tree.get("method") != "grid":
        return
    name = infer(config)
    if name not in ENUMERABLE:
        allowed = "value, values, int_uniform or q_uniform, or method: random"
        sheet.blame(path, f"{name} can't be enumerated by a grid, expected {allowed}", key=True)
    elif name == "categorical" and path not in _zipped_paths(sheet):
        _check_repeated(sheet, cast("list[Json]", config["values"]), (*path, "values"))


def _check_repeated(sheet: SweepDocument, values: list[Json], path: Path) -> None:
    for i, value in enumerate(values):
        first = next((j for j in range(i) if same(values[j], value)), None)
        if first is not None:
            again = f"the same as [{first}]; to run configurations more than once, give repeats"
            sheet.blame((*path, i), f"found {describe(value)}, {again}")


def _zip_groups(sheet: SweepDocument) -> list[list[str]]:
    groups = sheet.tree.get("zip")
    if not isinstance(groups, list):
        return []
    return [[str(name) for name in group] if isinstance(group, list) else [] for group in groups]


def _zipped_paths(sheet: SweepDocument) -> set[Path]:
    known = dict(parameter_paths(sheet.tree.get("parameters"), ("parameters",)))
    return {known[name] for group in _zip_groups(sheet) for name in group if name in known}


def _check_zip(sheet: SweepDocument) -> None:
    groups = _zip_groups(sheet)
    if groups and sheet.tree.get("method") == "random":
        sheet.blame(("zip",), "parameters drawn at random can't advance together, expected method: grid", key=True)
        return
    counts = dict(_value_counts(sheet.tree.get("parameters")))
    uses = Counter(name for group in groups for name in group)
    for g, group in enumerate(groups):
        if len(group) < 2:
            sheet.blame(("zip", g), f"found {len(group)} names, expected at least 2")
        for i, name in enumerate(group):
            if name not in counts:
                sheet.blame(("zip", g, i), f"{name!r} is no parameter with values{did_you_mean(name, counts)}")
            elif uses[name] > 1:
                sheet.blame(("zip", g, i), f"{name!r} is named {uses[name]} times, expected once")
        lengths = {name: counts[name] for name in group if name in counts}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            sheet.blame(("zip", g), f"found lists of unequal length: {shown}")


def _value_counts(parameters: Json, above: str = "") -> Iterator[tuple[str, int]]:
    for name, config in parameters.items() if isinstance(parameters, dict) else ():
        if not isinstance(config, dict):
            continue
        values = config.get("values")
        if isinstance(values, list):
            yield above + name, len(values)
        yield from _value_counts(config.get("parameters"), f"{above}{name}.")


def _check_size(sheet: SweepDocument) -> None:
    """Run last among the checks of trials' number; counts only what is otherwise good."""
    method, cap = sheet.tree.get("method"), sheet.tree.get("run_cap")
    if method == "random" and cap is None:
        sheet.blame(("run_cap",), "missing, expected the number of trials: method random has no end", at=("method",))
    if isinstance(cap, int) and cap > MAX_TRIALS:
        sheet.blame(("run_cap",), f"found {describe(cap)}, expected at most {MAX_TRIALS:,}")


def _check_env(sheet: SweepDocument) -> None:
    env = sheet.tree.get("env")
    for name, value in env.items() if isinstance(env, dict) else ():
        path = ("env", name)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            sheet.blame(
                path, "not a variable's name, expected letters, digits and _, not beginning with a digit", key=True
            )
        elif name.startswith(("ORC_", "SLURM_")):
            sheet.blame(path, "names that begin with ORC_ or SLURM_ are set for each trial and job", key=True)
        elif not isinstance(value, str):
            remedy = f"; quote it: '{json.dumps(value)}'" if isinstance(value, bool | int | float) else ""
            sheet.blame(path, f"found {describe(value)}, expected a string{remedy}")


def _check_launch(sheet: SweepDocument) -> None:
    launch = sheet.tree.get("launch")
    if not isinstance(launch, dict):
        return
    given = [key for key in ("conda", "venv", "uv") if launch.get(key) is not None]
    for key in given[1:]:
        sheet.blame(("launch", key), f"{' and '.join(given)} are given, expected at most one environment", key=True)
    for key in ("conda", "venv", "uv", "apptainer"):
        value = launch.get(key)
        if isinstance(value, str) and (not value or not value.isprintable()):
            sheet.blame(("launch", key), f"found {describe(value)}, expected a name or path")


def _check_pack(sheet: SweepDocument) -> None:
    launch = sheet.tree.get("launch")
    pack = launch.get("pack") if isinstance(launch, dict) else None
    if not isinstance(launch, dict) or not isinstance(pack, int) or pack <= 1:
        return
    many = [f"{key}: {n}" for key in ("ranks_per_node", "nodes") if isinstance(n := launch.get(key), int) and n > 1]
    others = [*(["a command"] if sheet.tree.get("command") is not None else []), *many]
    if others:
        sheet.blame(("launch", "pack"), f"found {pack}, expected 1 with {' and '.join(others)}: a pack is one process")
    size = launch.get("trials_per_task")
    if isinstance(size, int) and size < pack:
        remedy = "the trials of a pack are of one block"
        sheet.blame(("launch", "pack"), f"found {pack}, expected at most launch.trials_per_task, {size}: {remedy}")


def _check_size_of_job(sheet: SweepDocument) -> None:
    launch, options = sheet.tree.get("launch"), sheet.tree.get("slurm")
    if not isinstance(launch, dict):
        return
    if isinstance(shared := launch.get("trials_per_gpu"), int) and shared > 1 and not launch.get("gpus"):
        sheet.blame(("launch", "trials_per_gpu"), f"found {shared}, expected launch.gpus with it: 1 for each trial")
    nodes = launch.get("nodes")
    if not isinstance(nodes, int) or nodes < 2:
        return
    if (form := launch.get("form")) in ("exec", "trap"):
        sheet.blame(("launch", "form"), f"found {describe(form)}, expected srun with launch.nodes: {nodes}")
    for name in ("nodes", "ntasks", "ntasks-per-node"):
        if isinstance(options, dict) and name in options:
            sheet.blame(("slurm", name), f"is given, expected launch.nodes: {nodes} alone to say it", key=True)


def _check_checkpoint(sheet: SweepDocument) -> None:
    section = sheet.tree.get("checkpoint")
    every = section.get("every") if isinstance(section, dict) else None
    if not isinstance(every, str):
        return
    try:
        Interval.of(every)
    except ValueError:
        expected = "expected an interval such as 30s, 5m, 2h, 500 steps, epoch or 2 epochs, or auto, or off"
        sheet.blame(("checkpoint", "every"), f"found {describe(every)}, {expected}")


CHECKS = (
    _check_name,
    _check_program,
    _check_parameters,
    _check_size,
    _check_zip,
    _check_env,
    _check_launch,
    _check_pack,
    _check_size_of_job,
    _check_checkpoint,
)
"""Every check; each one passes over values of a wrong type, which are blamed already."""
