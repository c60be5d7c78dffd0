"""Programs that know nothing of us: a `command:` per trial, in workers that never import torch.

A program finds ORC_SWEEP (the sweep's folder), ORC_TRIAL (index), ORC_ATTEMPT (from 0), ORC_SEED, ORC_PARAMS (a JSON
file), ORC_CHECKPOINT (a folder that survives preemption), ORC_REPORT (a file to which it appends JSON lines such as
{"step": 3, "val_loss": 0.31}) and ORC_CODE (the copy of the sweep file's folder, made when the sweep was submitted).
SIGTERM asks it to save; exit 75 means "go on later"; exit 0 without a report of the objective is a failure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import orjson

from orchestrator.config.snapshot import Lineage
from orchestrator.config.spec import SweepSpec
from orchestrator.core import atomic, scratch
from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.channel import Channel, Send, say, serve
from orchestrator.core.messages import AttemptEnded, Cause, Message, RunTrial, Unable
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process_tree import die_with_parent
from orchestrator.core.signals import name_of, wait_readable
from orchestrator.errors import ProgramError
from orchestrator.worker.command_reports import Reports, new_file, said_before

__all__ = ["CommandRunner", "attempt_folder", "expand", "flat", "prepared", "server"]

_GO_ON_LATER = 75
_LOOK_S = 0.5
"""How often new reports are passed on while the program runs, in seconds."""
_PYTHON = re.compile(r"(?:python|pypy)[0-9.]*|\$\{interpreter\}")
_PLAIN_FLAGS = re.compile(r"-[bBdEiIOPqsSuvx]+")
_PROBE_S = 60.0
_ROOM_BYTES = 4096
_MACRO = re.compile(r"\$\{(?:envvar:([A-Za-z_][A-Za-z0-9_]*)|[a-z_]+)\}")


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


def expand(
    command: tuple[str, ...], params: JsonObject, *, params_file: Path, environment: Mapping[str, str]
) -> list[str]:
    """The argument list of a trial: W&B's macros replaced, each whole or inside a longer argument.

    `${args}` gives --name=value for every parameter, `${args_no_hyphens}` name=value; `${args_no_boolean_flags}` turns
    true into --name and leaves false out; `${args_json}` is one JSON argument and `${args_json_file}` a file with it;
    `${interpreter}`, `${env}` and `${envvar:NAME}`, from `environment`, are as in W&B (`${program}` was replaced when
    the file was read). Values are passed as arguments and never seen by a shell.

    Raises:
        ProgramError: `${envvar:NAME}` of a variable that is not in the environment.
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
        found += many[part] if part in many else [_replace(part, one, environment)]
    return found


def _replace(part: str, macros: dict[str, str], environment: Mapping[str, str]) -> str:
    # In one pass: what a value holds is never looked at again.
    return _MACRO.sub(
        lambda match: _variable(match[1], environment) if match[1] else macros.get(match[0], match[0]), part
    )


def _variable(name: str, environment: Mapping[str, str]) -> str:
    try:
        return environment[name]
    except KeyError:
        raise ProgramError(
            f"command: ${{envvar:{name}}}: the worker has no such variable; a Slurm job is given a short list of those "
            f"that were set when it was submitted, so give {name} under env: in the sweep file"
        ) from None


class CommandRunner:
    """Runs one program after the other.

    Args:
        paths: the sweep.
        spec: its spec.
        channel: to the supervisor.
        folder: for files of attempts, which someone else removes in the end: this process may be killed.
    """

    _ENDS_REST = True

    def __init__(self, paths: SweepPaths, spec: SweepSpec, channel: Channel, folder: Path) -> None:
        self._paths = paths
        self._spec = spec
        self._channel = channel
        self._scratch = folder
        self._lineage = Lineage.of(paths)
        self._command = from_snapshot(spec.command or (), self._lineage.folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._noticed = False
        self._told = False
        # The supervisor's message says all: a signal alone may come from anybody, such as a program to its group.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _pass_on(self, _action: str = "leave") -> None:
        """Tell the program of a notice of the supervisor's, once, however often it comes."""
        self._noticed = True
        if self._process is not None and not self._told:
            self._told = True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def serve(self) -> None:
        """Run trials until the supervisor closes the channel."""
        serve(self._channel, self._attempt, self._pass_on, ends_rest=self._ENDS_REST)

    def _attempt(self, assigned: RunTrial, send: Send) -> Message:
        try:
            with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as folder:
                return self._run(assigned, Path(folder), send)
        except OSError as error:  # a full disk, say, which is not the trial's fault
            return Unable(reason=f"{error.filename or self._scratch}: {error.strerror or error}")

    def _run(self, assigned: RunTrial, folder: Path, send: Send) -> Message:
        params = assigned.params
        # In this order: what an earlier attempt, which may still be at work, reports later is not in this checkpoint.
        checkpoint = self._checkpoints(assigned)
        params_file, reports = folder / "params.json", self._reports(assigned, folder, send)
        params_file.write_bytes(orjson.dumps(params))
        environment = self._environment(assigned, params_file, reports.path, checkpoint)
        try:
            argv = expand(self._command, params, params_file=params_file, environment=environment)
        except ProgramError as error:
            return AttemptEnded(cause=Cause.ERROR, detail=str(error))
        self._told = False
        try:
            self._process = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                process_group=0,  # a signal to its group is not for this process, nor for the next program
                preexec_fn=partial(_defaults, os.getpid()),
            )
        except (OSError, ValueError) as error:  # ValueError: a null character in a value
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return AttemptEnded(cause=Cause.ERROR, detail=f"{argv[0]} can't be started: {reason}")
        if self._noticed:
            self._pass_on()  # it came before there was a program to tell
        self._wait(reports)
        code, self._process = self._process.returncode, None
        reports.look(final=True)
        answer = _ended(code) or self._outcome(reports)
        if isinstance(answer, AttemptEnded) and answer.cause is Cause.ERROR:
            check_room(self._paths.checkpoints)
        return answer

    def _reports(self, assigned: RunTrial, folder: Path, send: Send) -> Reports:
        """Return the reports, whose file lies beside the checkpoints: one that is resumed from has its reports, too."""
        index, attempt = assigned.index, assigned.attempt
        earlier = earlier_with_checkpoint(self._paths.checkpoint(index), attempt)
        path = new_file(self._paths, index, attempt, earlier)
        return Reports(path, self._spec, send, said_before(self._paths, index, earlier))

    def _outcome(self, reports: Reports) -> Message:
        """Return what the trial came to, after its program has left with 0."""
        return reports.outcome()

    def _wait(self, reports: Reports) -> None:
        assert self._process is not None
        handle = os.pidfd_open(self._process.pid)
        try:
            while handle not in self._wait_for_news(handle):
                reports.look()
        finally:
            os.close(handle)
        self._process.wait()

    def _wait_for_news(self, handle: int) -> set[int]:
        """Wait until the program ends, or the supervisor says something, or it is time to look at the reports."""
        channel = [] if self._channel.closed else [self._channel.fileno()]
        ready = wait_readable([handle, *channel], _LOOK_S)
        for action in self._channel.notices() if ready.intersection(channel) else ():
            self._pass_on(action)
        return ready

    def _python_path(self) -> list[str]:
        before = os.environ.get("PYTHONPATH")
        first = dict.fromkeys(map(str, (self._lineage.folder, self._lineage.code, *self._lineage.twins(sys.path))))
        return [*first, *([before] if before else [])]

    def _checkpoints(self, assigned: RunTrial) -> Path:
        """Make the attempt's checkpoint folder and return it."""
        return checkpoint_folder(self._paths.checkpoint(assigned.index), assigned.attempt)

    def _environment(self, assigned: RunTrial, params_file: Path, report: Path, checkpoint: Path) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(self._python_path()),
            "ORC_SWEEP": str(self._paths.root),
            "ORC_TRIAL": str(assigned.index),
            "ORC_ATTEMPT": str(assigned.attempt),
            "ORC_SEED": str(assigned.seed),
            "ORC_PARAMS": str(params_file),
            "ORC_REPORT": str(report),
            "ORC_CODE": str(self._lineage.folder),
            "ORC_CHECKPOINT": str(checkpoint),
        }


def from_snapshot(command: tuple[str, ...], code: Path) -> tuple[str, ...]:
    """The command with every file that the snapshot has, such as `train.py`, taken from there.

    So a program may be edited while trials wait, and still finds its data where it always does. The first argument is
    looked up on PATH unless it has a slash.
    """
    return tuple(
        str(code / part) if (position or "/" in part) and _is_file(code / part) else part
        for position, part in enumerate(command)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a whole script as an argument is too long for a name
        return False


def snapshot_first(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command with `-P` after a Python that runs `-c` or `-m`, which would look for modules in its folder first.

    A flag and not PYTHONSAFEPATH, since Python programs that it starts in turn would inherit that, and no longer find
    what lies beside them. Python has the flag since 3.11; an older one is left alone, and the log says so.
    """
    position = _python_of(command)
    if position is None:
        return command
    python = sys.executable if command[position] == "${interpreter}" else command[position]
    if not _knows_safe_path(python):
        say(f"{python}: not Python 3.11 or newer, so -c and -m take modules from the sweep file's folder as it is now")
        return command
    return (*command[: position + 1], "-P", *command[position + 1 :])


def _python_of(command: tuple[str, ...]) -> int | None:
    """Where in the command the Python is that is given `-c` or `-m`; None when there is none."""
    for position, part in enumerate(command):
        if _PYTHON.fullmatch(part.rpartition("/")[2]):
            after = itertools.dropwhile(_PLAIN_FLAGS.fullmatch, command[position + 1 :])
            if next(after, None) in ("-c", "-m"):
                return position
    return None


def _knows_safe_path(python: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-P", "-c", ""], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def checkpoint_folder(folder: Path, attempt: int) -> Path:
    """The checkpoint folder of an attempt, seeded from the newest earlier one: two live attempts never share one.

    It is there whole or not at all, so an attempt that ends while it is copied leaves the earlier one the newest.

    Raises:
        OSError: no room, say; what it began is gone again.
    """
    mine, earlier = attempt_folder(folder, attempt), earlier_with_checkpoint(folder, attempt)
    copy = folder / f".{mine.name}.{secrets.token_hex(6)}"
    try:
        if earlier is not None:
            shutil.copytree(attempt_folder(folder, earlier), copy, copy_function=_copy_durably)
            _sync_folders(copy)
        else:
            copy.mkdir(parents=True)
        _put(copy, mine)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return mine


def attempt_folder(folder: Path, attempt: int) -> Path:
    """Where an attempt at the trial with this folder saves."""
    return folder / f"attempt-{attempt}"


def earlier_with_checkpoint(folder: Path, attempt: int) -> int | None:
    """The newest earlier attempt that has a checkpoint folder, from which this one goes on; None without one."""
    return max((number for number in range(attempt) if attempt_folder(folder, number).is_dir()), default=None)


def check_room(folder: Path) -> None:
    """Return if a line can be written there: a program that fails for want of room is not to be charged for it.

    Raises:
        OSError: it can't; names the folder.
    """
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(_ROOM_BYTES))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _copy_durably(source: str, target: str) -> None:
    shutil.copy2(source, target)
    handle = os.open(target, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folders(top: Path) -> None:
    for folder, _, _ in os.walk(top):
        atomic.sync_folder(Path(folder))


def _put(new: Path, place: Path) -> None:
    """Move a folder to its place; what another copy of this attempt has left there goes."""
    old = new.with_name(f"{new.name}.old")
    with contextlib.suppress(FileNotFoundError):
        place.rename(old)
    new.rename(place)
    atomic.sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _defaults(worker: int) -> None:
    """In the new process: TERM asks it to save; USR1, which reaches every process of a step, must not end it.

    It ends with the worker, its parent.
    """
    die_with_parent(worker)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started the supervisor may block some


def _ended(code: int) -> AttemptEnded | None:
    """Return the end of an attempt whose program left with `code`; None when it left with 0."""
    if code == 0:
        return None
    if code < 0:
        return AttemptEnded(cause=Cause.SIGNAL, detail=f"killed by {name_of(-code)}")
    if code == _GO_ON_LATER:
        return AttemptEnded(cause=Cause.PREEMPTED, detail="left with exit code 75, to go on later")
    return AttemptEnded(cause=Cause.ERROR, detail=f"left with exit code {code}")


def server(paths: SweepPaths, spec: SweepSpec, at_end: contextlib.ExitStack) -> Callable[[Channel], None]:
    """What serves a command sweep's trials in a worker process; `at_end` removes what workers that were killed left."""
    spec, folder = prepared(spec, at_end)
    return lambda channel: CommandRunner(paths, spec, channel, folder).serve()


def prepared(spec: SweepSpec, at_end: contextlib.ExitStack) -> tuple[SweepSpec, Path]:
    """The spec with its command as runners run it, and a folder for their files, which `at_end` removes."""
    folder = scratch.make()
    at_end.callback(shutil.rmtree, folder, ignore_errors=True)
    return replace(spec, command=snapshot_first(spec.command or ())), folder
