"""Programs that know nothing of us: a `command:` per trial, in workers that never import torch.

A program finds ORC_SWEEP (the sweep's folder), ORC_TRIAL (index), ORC_SEED, ORC_PARAMS (a JSON file), ORC_CHECKPOINT (a
folder that survives preemption) and ORC_REPORT (a file to which it appends JSON lines such as {"step": 3, "val_loss":
0.31}). SIGTERM asks it to save; exit 75 means "go on later"; exit 0 without a report of the objective is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

from orchestrator.channel import Channel
from orchestrator.code import Manifest
from orchestrator.errors import FolderError
from orchestrator.objective import Diverged, NoResult, Objective, finite
from orchestrator.paths import SweepPaths
from orchestrator.records import Cause
from orchestrator.spec import SweepSpec
from orchestrator.store import Json, JsonObject

__all__ = ["expand", "flat", "say", "server"]

_GO_ON_LATER = 75
_LOOK_S = 0.5
"""How often new reports are passed on while the program runs, in seconds."""
_MACRO = re.compile(r"\$\{(?:envvar:([A-Za-z_][A-Za-z0-9_]*)|[a-z_]+)\}")


def say(text: str) -> None:
    """Print a line into the log. A log that has no room loses the line, and costs the trial nothing."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def flat(params: JsonObject, prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Parameters by dotted path: {"opt": {"lr": 1}} gives ("opt.lr", 1)."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _text(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _switches(params: list[tuple[str, Json]]) -> list[str]:
    given = [(name, value) for name, value in params if value is not False]
    return [f"--{name}" if value is True else f"--{name}={_text(value)}" for name, value in given]


def expand(command: tuple[str, ...], params: JsonObject, *, params_file: Path) -> list[str]:
    """The argument list of a trial: W&B's macros replaced, each whole or inside a longer argument.

    `${args}` gives --name=value for every parameter, `${args_no_hyphens}` name=value; `${args_no_boolean_flags}` turns
    true into --name and leaves false out; `${args_json}` is one JSON argument and `${args_json_file}` a file with it;
    `${interpreter}`, `${env}` and `${envvar:NAME}` are as in W&B (`${program}` was replaced when the file was read).
    Values are passed as arguments and never seen by a shell.
    """
    pairs = list(flat(params))
    many = {
        "${args}": [f"--{name}={_text(value)}" for name, value in pairs],
        "${args_no_hyphens}": [f"{name}={_text(value)}" for name, value in pairs],
        "${args_no_boolean_flags}": _switches(pairs),
    }
    one = {
        "${args_json}": json.dumps(params),
        "${args_json_file}": str(params_file),
        "${interpreter}": sys.executable,
        "${env}": "/usr/bin/env",
    }
    found: list[str] = []
    for part in command:
        found += many[part] if part in many else [_replace(part, one)]
    return found


def _replace(part: str, macros: dict[str, str]) -> str:
    # In one pass: what a value holds is never looked at again.
    return _MACRO.sub(lambda match: os.environ.get(match[1], "") if match[1] else macros.get(match[0], match[0]), part)


class Runner:
    """Runs one program after the other.

    Args:
        paths: the sweep.
        spec: its spec.
        channel: to the supervisor.
    """

    def __init__(self, paths: SweepPaths, spec: SweepSpec, channel: Channel) -> None:
        self._paths = paths
        self._spec = spec
        self._channel = channel
        self._code = code_folder(paths)
        self._command = from_snapshot(spec.command or (), self._code)
        self._process: subprocess.Popen[bytes] | None = None
        self._noticed = False
        signal.signal(signal.SIGUSR1, self._pass_on)

    def _pass_on(self, *_: object) -> None:
        self._noticed = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def serve(self) -> None:
        """Run trials until the supervisor closes the channel."""
        while not self._channel.closed:
            for message in self._channel.receive():
                self._channel.send(self._attempt(message))

    def _attempt(self, message: JsonObject) -> JsonObject:
        name = f"trial {message['trial']} attempt {message['attempt']}"
        say(f"=== {name}: start {message['params']}")
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="orc-", ignore_cleanup_errors=True) as scratch:
                answer = self._run(message, Path(scratch))
        except OSError as error:  # a full disk, say, which is not the trial's fault
            answer = {"broken": f"{error.filename or tempfile.gettempdir()}: {error.strerror or error}"}
        end = answer.get("outcome", answer.get("detail", answer.get("broken")))
        say(f"=== {name}: {end} after {time.monotonic() - began:.2f} s")
        return answer

    def _run(self, message: JsonObject, scratch: Path) -> JsonObject:
        params = message["params"]
        assert isinstance(params, dict)
        params_file, reports = scratch / "params.json", Reports(scratch / "report.jsonl", self._spec, self._channel)
        params_file.write_bytes(orjson.dumps(params))
        argv = expand(self._command, params, params_file=params_file)
        environment = self._environment(message, params_file, reports.path)
        try:
            self._process = subprocess.Popen(
                argv, cwd=self._cwd(), env=environment, stdin=subprocess.DEVNULL, preexec_fn=_defaults
            )
        except (OSError, ValueError) as error:  # ValueError: a null character in a value
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return {"end": Cause.ERROR.value, "detail": f"{argv[0]} can't be started: {reason}"}
        if self._noticed:
            self._pass_on()  # it came before there was a program to tell
        self._wait(reports)
        code, self._process = self._process.returncode, None
        reports.look(final=True)
        return _ended(code) or reports.outcome()

    def _wait(self, reports: Reports) -> None:
        assert self._process is not None
        handle = os.pidfd_open(self._process.pid)
        try:
            while not select.select([handle], [], [], _LOOK_S)[0]:
                reports.look()
        finally:
            os.close(handle)
        self._process.wait()

    def _cwd(self) -> Path:
        """Where the sweep file is; but `python -m module` finds the module in its folder, so there in the snapshot."""
        return self._code if "-m" in self._command else Path.cwd()

    def _python_path(self) -> list[str]:
        before = os.environ.get("PYTHONPATH")
        return [str(self._code), str(self._paths.code), *([before] if before else [])]

    def _environment(self, message: JsonObject, params_file: Path, report: Path) -> dict[str, str]:
        index = int(str(message["index"]))
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(self._python_path()),
            "ORC_SWEEP": str(self._paths.root),
            "ORC_TRIAL": str(index),
            "ORC_SEED": str(message["seed"]),
            "ORC_PARAMS": str(params_file),
            "ORC_REPORT": str(report),
            "ORC_CHECKPOINT": str(checkpoint_folder(self._paths.checkpoint(index), int(str(message["attempt"])))),
        }


def code_folder(paths: SweepPaths) -> Path:
    """The sweep file's folder in the snapshot; the snapshot itself where it doesn't say."""
    try:
        return paths.code / Manifest.read(paths.code).folder
    except FolderError:
        return paths.code


def from_snapshot(command: tuple[str, ...], code: Path) -> tuple[str, ...]:
    """The command with every file that the snapshot has, such as `train.py`, taken from there.

    So a program may be edited while trials wait, and still finds its data where it always does. The first argument is
    looked up on PATH unless it has a slash.
    """
    return tuple(
        str(code / part) if (position or "/" in part) and (code / part).is_file() else part
        for position, part in enumerate(command)
    )


def checkpoint_folder(folder: Path, attempt: int) -> Path:
    """The checkpoint folder of an attempt, seeded from the newest earlier one: two live attempts never share one."""
    mine = folder / f"attempt-{attempt}"
    earlier = [number for number in range(attempt) if (folder / f"attempt-{number}").is_dir()]
    shutil.rmtree(mine, ignore_errors=True)
    if earlier:
        shutil.copytree(folder / f"attempt-{earlier[-1]}", mine)
    mine.mkdir(parents=True, exist_ok=True)
    return mine


def _defaults() -> None:
    """In the new process: TERM asks it to save; USR1, which reaches every process of a step, must not end it."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _ended(code: int) -> JsonObject | None:
    """The end of an attempt whose program left with `code`; None when it left with 0."""
    if code == 0:
        return None
    if code < 0:
        return {"end": Cause.SIGNAL.value, "detail": f"killed by {signal.Signals(-code).name}"}
    if code == _GO_ON_LATER:
        return {"end": Cause.PREEMPTED.value, "detail": "left with exit code 75, to go on later"}
    return {"end": Cause.ERROR.value, "detail": f"left with exit code {code}"}


class Reports:
    """The file to which a program appends its reports.

    Args:
        path: the file; it need not exist.
        spec: for the objective.
        channel: where reports are passed on.
    """

    def __init__(self, path: Path, spec: SweepSpec, channel: Channel) -> None:
        self.path = path
        self._channel = channel
        self._objective = Objective(spec.metric)
        self._offset = 0
        self._diverged = False
        self._lines = 0

    def look(self, *, final: bool = False) -> None:
        """Take the lines that are new and complete; the `final` look takes a last one without newline, too."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not (final or line.endswith(b"\n")):
                    break
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            step, metrics = _split(json.loads(line), self._lines)
            self._channel.send({"report": {"step": step, "metrics": finite(metrics)}})
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            say(f"ORC_REPORT: not a report: {line[:200]!r}")
            return
        self._lines += 1
        if not self._diverged:
            try:
                self._objective.take(step, metrics)
            except Diverged:
                self._diverged = True

    def outcome(self) -> JsonObject:
        """What the trial came to, after its program has left with 0."""
        try:
            status, payload = self._objective.outcome()
        except NoResult as error:
            return {"end": Cause.ERROR.value, "detail": str(error)}
        return {"outcome": status.value, "payload": payload}


def _split(report: dict[str, object], line: int) -> tuple[int, dict[str, float]]:
    """Step and metrics of a report; `line` is the step of one that names none."""
    step = report.get("step", line)
    metrics = {
        name: float(value) for name, value in report.items() if name != "step" and isinstance(value, (int, float))
    }
    if not isinstance(step, (int, float)) or step != int(step):
        raise ValueError(f"step is {step!r}, but should be a whole number")
    return int(step), metrics


def server(paths: SweepPaths, spec: SweepSpec) -> Callable[[Channel], None]:
    """What serves a command sweep's trials in a worker process."""
    return lambda channel: Runner(paths, spec, channel).serve()
