"""What a program that a `command:` has started can ask for: `orc.current()`.

    run = orc.current(lr=0.1)               parameters of the trial; 0.1 if it has no lr, or when run by hand
    run.params, run.seed                    what to do
    run.report(step=3, val_loss=0.31)       what came of it
    run.checkpoint_dir                      where to save, and what an earlier attempt has saved
    if run.should_stop: ...; run.leave()    a notice has come: save, and go on later

By hand, outside of a sweep, the same script works: parameters are the defaults, reports are printed, checkpoints lie in
`checkpoints/`, and nothing asks it to stop. Importing this costs milliseconds, and loads the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, SupportsFloat

from orchestrator.errors import OrcError, UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from orchestrator.core.atomic import Json, JsonObject

__all__ = ["Attempt", "current"]

_GO_ON_LATER = 75
_BY_HAND = "checkpoints"


class Attempt:
    """The attempt at a trial that this process is, or is a rank of.

    Args:
        environment: the process's.
        defaults: parameters where the trial has none of that name.

    Raises:
        UsageError: the environment is not what a worker gives to a program.
    """

    def __init__(self, environment: Mapping[str, str], defaults: Mapping[str, Json]) -> None:
        self._is_trial = "ORC_TRIAL" in environment
        self._environment = dict(environment)
        self.params: JsonObject = {**defaults, **self._given()}
        """By name, as in the sweep file."""
        self.seed = self._number("ORC_SEED")
        """The trial's own, from 0 to 2**63 - 1; 0 by hand."""
        self.trial = self._number("ORC_TRIAL")
        """Its index in the sweep; 0 by hand."""
        self.attempt = self._number("ORC_ATTEMPT")
        """How many attempts at it there were before."""
        self.rank = self._number("RANK")
        """Of this process among those of the trial."""
        self.world_size = self._number("WORLD_SIZE", 1)
        """How many processes the trial has."""
        self._listens = False
        self._has_notice = False
        self._stops = False
        self._group: tuple[ProcessGroup | None, ProcessGroup] | None = None

    def _given(self) -> JsonObject:
        if not self._is_trial:
            return {}
        path = self._environment.get("ORC_PARAMS", "")
        try:
            found = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"ORC_PARAMS: {path!r} can't be read: {error}; a program finds its parameters while its trial runs"
            ) from error
        assert isinstance(found, dict)
        return found

    def _number(self, name: str, otherwise: int = 0) -> int:
        text = self._environment.get(name, str(otherwise))
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{name}: found {text!r}, expected a whole number") from None

    def fill(self, defaults: Mapping[str, Json]) -> None:
        """Add parameters that are not there yet."""
        for name, value in defaults.items():
            self.params.setdefault(name, value)

    # What came of it

    def report(self, step: int | None = None, **metrics: SupportsFloat) -> None:
        """Report metrics: numbers, or anything with one number in it, such as a tensor. NaN is one, too.

        What is reported is there also if the process is killed a moment later. With several ranks, rank 0 reports for
        all, and this does nothing on the others.

        Args:
            step: where in training that is, a whole number that grows; None counts reports.
            metrics: by name; one of them is the objective.

        Raises:
            UsageError: something is no number.
            OrcError: it can't be written.
        """
        line = _line(step, metrics)
        if self.rank > 0:
            return
        if self._is_trial:
            _append(Path(self._environment["ORC_REPORT"]), line)
        else:
            print(line.decode(), end="", flush=True)

    @property
    def checkpoint_dir(self) -> Path:
        """A folder that is there, for whatever the program saves: it survives preemption.

        Each attempt has its own, one for all ranks, with a copy of what the one before has left. By hand it is
        `checkpoints` in the working folder.
        """
        path = Path(self._environment["ORC_CHECKPOINT"]) if self._is_trial else Path(_BY_HAND)
        path.mkdir(parents=True, exist_ok=True)
        return path

    # Notices

    @property
    def should_stop(self) -> bool:
        """Whether a notice has come: time to save, and to `leave`. Never, by hand.

        From the first time that it is asked, SIGTERM no longer ends the process; a handler that was there is called
        as well. With several ranks that torch.distributed connects, it is what all of them agree on, so that they leave
        at the same step: all must ask at the same places. That costs an exchange of one number over gloo.

        Raises:
            UsageError: it is asked for the first time in another thread than the main one.
        """
        if not self._is_trial:
            return False
        self._listen()
        self._stops = self._stops or self._agreed(self._has_notice)
        return self._stops

    def leave(self) -> NoReturn:
        """End the process with exit code 75: the trial goes on later, from what has been saved.

        Raises:
            SystemExit: always, so `finally` blocks are run.
        """
        sys.exit(_GO_ON_LATER)

    def _listen(self) -> None:
        if self._listens:
            return
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("should_stop: ask in the main thread first, since no other may take signals")
        before = signal.getsignal(signal.SIGTERM)

        def take(number: int, frame: FrameType | None) -> None:
            self._has_notice = True
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, take)
        self._listens = True

    def _agreed(self, has_notice: bool) -> bool:
        """Whether one of the ranks has a notice; this one alone, if nothing connects them."""
        if self.world_size == 1 or "torch.distributed" not in sys.modules:
            return has_notice
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return has_notice
        if self._group is None or self._group[0] is not dist.group.WORLD:
            self._group = (dist.group.WORLD, dist.new_group(backend="gloo"))
        found = torch.tensor([int(has_notice)])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group[1])
        return bool(found.item())


def _line(step: int | None, metrics: Mapping[str, SupportsFloat]) -> bytes:
    if not metrics:
        raise UsageError("report: no metric is given, expected one at least, such as report(step=3, val_loss=0.31)")
    found = {name: _number(name, value) for name, value in metrics.items()}
    if step is None:
        return json.dumps(found).encode() + b"\n"
    where = _number("step", step)
    if where != where or where in (float("inf"), float("-inf")) or where != int(where):
        raise UsageError(f"report: step is {where!r}, expected a whole number")
    return json.dumps({"step": int(where), **found}).encode() + b"\n"


def _number(name: str, value: SupportsFloat) -> float:
    if not isinstance(value, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            return value if isinstance(value, int) else float(value)
    raise UsageError(f"report: {name} is {value!r:.200}, expected one number")


def _append(path: Path, line: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            num_written = os.write(handle, line)
        finally:
            os.close(handle)
    except OSError as error:
        raise OrcError(f"ORC_REPORT: {path}: can't be written: {error.strerror}") from error
    if num_written != len(line):
        raise OrcError(f"ORC_REPORT: {path}: there is no room left for a report")


_current: Attempt | None = None


def current(**defaults: Json) -> Attempt:
    """The trial that this process is, started by a `command:`; or, by hand, something that works like one.

    Every call gives the same object.

    Args:
        defaults: parameters where the trial has none of that name, and by hand.

    Raises:
        UsageError: this is a worker that trains a `program:`, whose `train` is given its trial.
    """
    global _current
    if "orchestrator.worker.single" in sys.modules and "ORC_TRIAL" not in os.environ:
        raise UsageError(
            "orc.current() is for programs that a command: starts; this is a program:, whose train(trial, ...) has "
            "trial.params, trial.report and trial.extra_state"
        )
    if _current is None:
        _current = Attempt(os.environ, defaults)
    _current.fill(defaults)
    return _current
