"""sbatch scripts as text: a request in, a script out; no clock, no environment, nothing written.

    for first, count in arrays(num_workers, max_array_size):
        render_workers(WorkersRequest(spec=spec, first_worker=first, num_workers=count, ...))
    render_reducer(ReducerRequest(spec=spec, ...))

The three launch forms are three templates. A script and the worker that it starts agree on this, all by environment:

    ORC_NOTICE   set when a notice came before the worker was started: to the worker, one that it has just got
    ORC_READY    a path (trap, srun); the worker creates the file once its signal handlers stand; none is sent before
    ORC_ACK      a path (trap, srun); the worker creates the file at *every* notice, which is repeated until then

Both paths lie in a node-local folder of the script's own, which it removes when the worker has gone. A notice arrives
as TERM (exec, trap) or USR1 (srun), and at times as TERM directly from Slurm, so the worker takes both for the same.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Environment

    from orchestrator.config.spec import Launch, SweepSpec
    from orchestrator.core.atomic import Json

__all__ = [
    "EXPORTED",
    "OWNED",
    "Form",
    "LevelRequest",
    "ReducerRequest",
    "WorkersRequest",
    "arrays",
    "form_of",
    "render_reducer",
    "render_workers",
]

Form: TypeAlias = Literal["exec", "trap", "srun"]

OWNED = frozenset(
    (
        *("array", "chdir", "comment", "dependency", "error", "export", "export-file", "help", "job-name"),
        *("no-requeue", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "usage"),
        *("verbose", "version", "wait", "wrap"),
    )
)
"""sbatch's options that the scripts and the submission set themselves; a sweep file can't."""

EXPORTED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ"),
    *("MODULEPATH", "MODULESHOME", "LMOD_CMD"),
)
"""What of the submitter's environment goes along; sbatch's default, all of it, copies secrets into Slurm's state."""

_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z0-9._-]+")
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./^~\[\]-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReducerRequest:
    """What the reducer's script needs.

    Args:
        spec: the sweep.
        sweep_id: the sweep's id, `<name>-<hash>`.
        root: the sweep's folder, absolute.
        python: the interpreter, absolute; used unless `launch` names an environment of its own.
        token: the submission's random token, hexadecimal digits.
        epoch: the submission's number, from 0.
        num_ranges: ranges of trials that reducers of level 0 have folded before; 1 for none.

    Raises:
        UsageError: a value that a script can't say: all of them, one a line.
    """

    spec: SweepSpec
    sweep_id: str
    root: str
    python: str
    token: str
    epoch: int = 0
    num_ranges: int = 1

    @classmethod
    def of(cls, plain: ReducerRequest, **more: int) -> Self:
        """A request of this kind about the same sweep and submission, with what it needs besides."""
        given: dict[str, object] = {each.name: getattr(plain, each.name) for each in fields(ReducerRequest)}
        return cls(**{**given, **more})  # type: ignore[arg-type]  # as the fields are

    def __post_init__(self) -> None:
        problems = [*_problems(self), *_launch_problems(self.spec.launch), *_option_problems(self.spec)]
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def job_name(self) -> str:
        """Name of the reducer job: it tells sweep and submission apart."""
        return f"{self.sweep_id}.{self.token[:8]}.reduce"


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRequest(ReducerRequest):
    """What the script of one level of a tree of reducers needs, below its root.

    Args:
        level: 0 for those that fold ranges of trials.
        num_reducers: how many there are, elements of one array.
    """

    level: int
    num_reducers: int

    @property
    def job_name(self) -> str:
        """Name of the array job: it tells sweep, submission and level apart."""
        return f"{self.sweep_id}.{self.token[:8]}.reduce-{self.level}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersRequest(ReducerRequest):
    """What the script of one array of workers needs.

    Args:
        num_workers: elements of this array.
        first_worker: number of the worker that element 0 is; the workers of one sweep may fill several arrays.
        num_arrays: how many arrays the submission has; they share the throttle, each gets one running element at least.
    """

    num_workers: int
    first_worker: int = 0
    num_arrays: int = 1

    @property
    def job_name(self) -> str:
        """Name of the array job: it tells sweep and submission apart."""
        return f"{self.sweep_id}.{self.token[:8]}"


def form_of(launch: Launch) -> Form:
    """The launch form of a Slurm job: `auto` is `srun`, the one that hears of a preemption at once on every site."""
    return "srun" if launch.form == "auto" else launch.form


def arrays(num_workers: int, max_array_size: int) -> list[tuple[int, int]]:
    """The arrays that hold `num_workers` elements, as (first worker, count).

    MaxArraySize is one more than the greatest *index*, so every array starts at index 0 and carries its offset along.

    Raises:
        UsageError: this Slurm allows no arrays (MaxArraySize 0 or 1).
    """
    if max_array_size < 2:
        raise UsageError(f"this Slurm allows no job arrays: MaxArraySize is {max_array_size}; a sweep needs at least 2")
    starts = range(0, num_workers, max_array_size)
    return [(first, min(max_array_size, num_workers - first)) for first in starts]


def render_workers(request: WorkersRequest) -> str:
    """The script of an array of workers, in the launch form of its sweep."""
    launch = request.spec.launch
    form = form_of(launch)
    options = {
        **_options(request, log="%A_%a.log"),
        "array": f"0-{request.num_workers - 1}{_throttle(request)}",
        "signal": f"B:TERM@{launch.notice_s}",
        **_size(request.spec),
        **request.spec.slurm,
    }
    return _render(
        f"{form}.sh.j2",
        request,
        options,
        banner=f"Workers {_range(request)} ({form}) of {_sweep(request)}",
        first_worker=request.first_worker,
        cpus=_option_text(options["cpus-per-task"] or launch.cpus_per_task),
        nodes=launch.nodes,
        slots=launch.trials_per_node,
    )


def _size(spec: SweepSpec) -> dict[str, Json]:
    """How large a job is."""
    launch = spec.launch
    found: dict[str, Json] = {"nodes": launch.nodes, "ntasks-per-node": 1} if launch.nodes > 1 else {}
    found["cpus-per-task"] = launch.cpus_per_task
    if launch.gpus and not any(name.startswith("gpus") for name in spec.slurm):
        found["gres"] = f"gpu:{launch.gpus_per_node}"
    return found


def render_reducer(request: ReducerRequest) -> str:
    """The script of the reducer job, or of a level of reducers."""
    reduce = request.spec.reduce
    ranks = reduce.ranks if request.num_ranges == 1 else 1
    own = _options(request, log="reducer-%j.log")
    if isinstance(request, LevelRequest):
        own |= {"array": f"0-{request.num_reducers - 1}", "output": _log(request, f"reduce-{request.level}-%A_%a.log")}
    tasks: dict[str, Json] = {"ntasks": ranks} if ranks > 1 else {}
    options = {**own, **request.spec.slurm, "cpus-per-task": 1, **tasks, **reduce.slurm}
    return _render(
        "reducer.sh.j2",
        request,
        options,
        banner=f"{_who_reduces(request)} of {_sweep(request)}",
        ranks=ranks,
        cpus=_option_text(options["cpus-per-task"] or 1),
        place=_place_in_tree(request),
    )


def _who_reduces(request: ReducerRequest) -> str:
    if isinstance(request, LevelRequest):
        return f"Reducers 0 to {request.num_reducers - 1} of level {request.level}"
    return "The reducer" if request.num_ranges == 1 else "The root of the reducers"


def _place_in_tree(request: ReducerRequest) -> str:
    """Arguments that tell a reducer its trials; none where there is no tree."""
    if request.num_ranges == 1:
        return ""
    tree = f" --ranges {request.num_ranges} --fan-in {request.spec.reduce.fan_in}"
    own = f' --level {request.level} --number "$SLURM_ARRAY_TASK_ID"' if isinstance(request, LevelRequest) else ""
    return tree + own


def _sweep(request: ReducerRequest) -> str:
    return f"sweep {request.sweep_id}, submission {request.epoch}"


def _range(request: WorkersRequest) -> str:
    return f"{request.first_worker} to {request.first_worker + request.num_workers - 1}"


def _throttle(request: WorkersRequest) -> str:
    throttle = request.spec.launch.throttle
    return "" if throttle is None else f"%{max(1, throttle // request.num_arrays)}"


def _options(request: ReducerRequest, *, log: str) -> dict[str, Json]:
    return {
        "job-name": request.job_name,
        "chdir": request.root,
        "output": _log(request, log),
        "open-mode": "append",
        "requeue": True,
        "export": ",".join(EXPORTED),
    }


def _log(request: ReducerRequest, name: str) -> str:
    return f"{request.root.replace('%', '%%')}/logs/{name}"


def _render(template: str, request: ReducerRequest, options: Mapping[str, Json], **more: str | int) -> str:
    launch = request.spec.launch
    values = {
        "directives": [
            _directive(name, value) for name, value in options.items() if value is not None and value is not False
        ],
        "root": request.root,
        "token": request.token,
        "python": "python" if _has_environment(launch) else request.python,
        "image": launch.apptainer,
        "modules": launch.modules,
        "conda": launch.conda,
        "activate": _activate(launch),
        "env": request.spec.env,
        "setup": launch.setup.strip("\n"),
        "threads": launch.cpus,
    }
    return _templates().get_template(template).render(values, **more)


def _has_environment(launch: Launch) -> bool:
    return any((launch.conda, launch.venv, launch.uv, launch.apptainer))


def _activate(launch: Launch) -> str | None:
    """The file to source. `uv run` itself would stay between signals and worker, and synchronise at each start."""
    if launch.uv:
        return f"{launch.uv.rstrip('/')}/.venv/bin/activate"
    return f"{launch.venv.rstrip('/')}/bin/activate" if launch.venv else None


def _directive(name: str, value: Json) -> str:
    """An `#SBATCH` line. sbatch reads double quotes with backslashes inside, and takes a bare `#` for a comment."""
    if value is True:
        return f"#SBATCH --{name}"
    text = _option_text(value)
    if not _PLAIN.fullmatch(text):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={text}"


def _option_text(value: Json) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@cache
def _templates() -> Environment:
    # Imported here, since half of the commands that reach this module never render.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # S701: the text is bash, not HTML; every value passes the `quote` filter instead.
    environment = Environment(  # noqa: S701
        loader=FileSystemLoader(_template_folder()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = shlex.quote
    return environment


def _template_folder() -> Path:
    """`templates` beside this file in an installed wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


def _problems(request: ReducerRequest) -> list[str]:
    named = {"root": request.root, "python": request.python}
    words = {"sweep_id": request.sweep_id, "token": request.token}
    return [
        *(f"{name}: {value!r} must be an absolute path" for name, value in named.items() if not value.startswith("/")),
        *(
            f"{name}: {value!r} must be of A-Z a-z 0-9 . _ -"
            for name, value in words.items()
            if not _WORD.fullmatch(value)
        ),
        *_root_problems(request),
        *_unsayable("python", request.python),
    ]


def _root_problems(request: ReducerRequest) -> list[str]:
    # sbatch takes a backslash anywhere in --output for "no % patterns", and every log would get the same name.
    bad = {"\n": "a newline", "\r": "a carriage return", "\\": "a backslash"}
    if request.spec.launch.apptainer:
        bad |= {",": "a comma", ":": "a colon"}
    found = [what for character, what in bad.items() if character in request.root]
    where = f"the sweep's folder {request.root!r}"
    return [
        *(f"{where}: {what} can't be passed on; use another runs folder" for what in found),
        *_unsayable(where, request.root),
    ]


def _unsayable(where: str, value: str) -> list[str]:
    """Problems of a text that would be quoted into the script: sbatch refuses scripts with a NUL or DOS line ends."""
    if "\0" in value or "\r\n" in value:
        return [f"{where}: {value!r} holds a NUL or a DOS line end; sbatch takes no script with one"]
    try:
        value.encode()
    except UnicodeEncodeError:
        return [f"{where}: {value!r} is not valid UTF-8"]
    return []


def _launch_problems(launch: Launch) -> list[str]:
    environments = {"conda": launch.conda, "venv": launch.venv, "uv": launch.uv, "apptainer": launch.apptainer}
    given = {name: value for name, value in environments.items() if value}
    many = [f"launch: {' and '.join(given)} are given; a worker runs in one of them"] if len(given) > 1 else []
    relative = [
        f"launch.{name}: {value!r} must be an absolute path, since nodes may start in another folder"
        for name, value in given.items()
        if _is_path(name, value) and not value.startswith("/")
    ]
    texts = {**given, "setup": launch.setup, **{f"modules[{i}]": module for i, module in enumerate(launch.modules)}}
    return [
        *many,
        *relative,
        *(problem for name, text in texts.items() for problem in _unsayable(f"launch.{name}", text)),
    ]


def _is_path(name: str, value: str) -> bool:
    return not ((name == "conda" and "/" not in value) or (name == "apptainer" and "://" in value))


def _option_problems(spec: SweepSpec) -> list[str]:
    groups = {"slurm": spec.slurm, "reduce.slurm": spec.reduce.slurm}
    return [
        *(
            p
            for group, options in groups.items()
            for name, value in options.items()
            for p in _option_problem(group, name, value)
        ),
        *(
            f"env: {name!r} is no variable name: letters, digits, _"
            for name in spec.env
            if not _VARIABLE.fullmatch(name)
        ),
        *(problem for name, value in spec.env.items() for problem in _unsayable(f"env.{name}", value)),
    ]


def _option_problem(group: str, name: str, value: Json) -> list[str]:
    if not _OPTION.fullmatch(name):
        return [f"{group}: {name!r} is no option of sbatch: a long name without dashes in front, such as cpus-per-gpu"]
    if name in OWNED:
        return [f"{group}.{name}: is set by the sweep itself; see launch: for what can be chosen"]
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict | list) for item in value)):
        return [f"{group}.{name}: {value!r} must be a text, a number, true, false, or a list of texts"]
    text = _option_text(value)
    if "\n" in text or "\r" in text:
        return [f"{group}.{name}: {text!r} must be one line"]
    return _unsayable(f"{group}.{name}", text)
