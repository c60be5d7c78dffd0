"""What the program of a `command:` reports: lines that it appends to a file, and those of the attempts before it.

    path = new_file(paths, trial, attempt, earlier)         earlier: the attempt from whose checkpoint it goes on
    reports = Reports(path, spec, send, said_before(paths, trial, earlier))
    reports.look()                                          now and then
    forget(paths, trial, attempt)                           once the outcome is on the disk

The file lies where checkpoints do, so that whoever finds a checkpoint finds what was reported before it was saved. It
is not in the trial's own folder there: a copy of the trial on a node that was lost may still append to it after others
have finished, and have removed that folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path

from orchestrator.config.spec import SweepSpec
from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Send, say
from orchestrator.core.messages import AttemptEnded, Cause, Message, Outcome, Reported
from orchestrator.core.paths import SweepPaths
from orchestrator.results.objective import Diverged, NoResult, Objective, finite

__all__ = ["Reports", "forget", "joined", "new_file", "said_before"]


def new_file(paths: SweepPaths, trial: int, attempt: int, earlier: int | None) -> Path:
    """A file for the reports of an attempt, noted as its own: a copy of the same attempt has another one.

    Raises:
        OSError: no room, say; names the file.
    """
    path, note = paths.program_report(trial, attempt, secrets.token_hex(6)), paths.report_note(trial, attempt)
    try:
        with note.open("wb") as file:
            file.write(atomic.checked({"file": path.name, "earlier": earlier}))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(note)) from error
    return path


def _note(paths: SweepPaths, trial: int, attempt: int) -> JsonObject:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return atomic.unchecked(paths.report_note(trial, attempt).read_bytes().removesuffix(b"\n")) or {}
    return {}


def said_before(paths: SweepPaths, trial: int, earlier: int | None) -> list[bytes]:
    """The lines that the attempts before one have reported, each of which went on from a checkpoint of the one before.

    Args:
        paths: the sweep.
        trial: its index.
        earlier: the last of them; None if there is none.
    """
    if earlier is None:
        return []
    note, lines = _note(paths, trial, earlier), list[bytes]()
    if not note:  # lost with its node; what was there before is still known
        return said_before(paths, trial, earlier - 1 if earlier else None)
    with contextlib.suppress(FileNotFoundError):
        *lines, _torn = (paths.checkpoints / str(note["file"])).read_bytes().split(b"\n")
    before = note.get("earlier")
    return joined(said_before(paths, trial, before if isinstance(before, int) else None), lines)


def joined(before: list[bytes], after: list[bytes]) -> list[bytes]:
    """Reports of two attempts, of which the later one may have done steps of the earlier again."""
    first = next((step for line in after if (step := _step_of(line)) is not None), None)
    if first is None:
        return before + after
    return [line for line in before if (step := _step_of(line)) is None or step < first] + after


def _step_of(line: bytes) -> int | None:
    """The step that a report names."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        report = json.loads(line)
        return _split(report, 0)[0] if "step" in report else None
    return None


def forget(paths: SweepPaths, trial: int, attempt: int) -> None:
    """Remove what attempts have reported, up to this one; the records have it."""
    for path in paths.checkpoints.glob(f"{trial}.*"):
        number = path.name.split(".")[1]
        if number.isdecimal() and int(number) <= attempt:
            with contextlib.suppress(OSError):
                path.unlink()


class Reports:
    """The file to which a program appends its reports.

    Args:
        path: the file; it need not exist.
        spec: for the objective.
        send: passes reports on.
        before: lines of earlier attempts, which were passed on by them.
    """

    def __init__(self, path: Path, spec: SweepSpec, send: Send, before: list[bytes] | None = None) -> None:
        self.path = path
        self._before = before or []
        self._send = send
        self._objective = Objective(spec.metric)
        self._offset = 0
        self._diverged = False
        self._lines = 0

    def look(self, *, final: bool = False) -> None:
        """Take the lines that are new and complete; the `final` look takes a last one without newline, too."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                self._offset = 0  # it was removed, and has been begun again
            file.seek(self._offset)
            for line in file:
                if not (final or line.endswith(b"\n")):
                    break
                self._offset += len(line)
                self._take_before(line)
                self._take(line, self._send)
        if final:
            self._take_before(b"")

    def _take_before(self, line: bytes) -> None:
        """What was reported before this attempt's first line, but for steps that are done again."""
        before, self._before = self._before, []
        for one in joined(before, [line])[:-1]:
            self._take(one, lambda message: None)

    def _take(self, line: bytes, send: Send) -> None:
        try:
            step, metrics = _split(json.loads(line), self._lines)
            send(Reported(step=step, metrics=finite(metrics)))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            say(f"ORC_REPORT: not a report: {line[:200]!r}")
            return
        self._lines += 1
        if not self._diverged:
            try:
                self._objective.take(step, metrics)
            except Diverged:
                self._diverged = True

    def outcome(self) -> Message:
        """Return what the trial came to, after its program has left with 0."""
        try:
            status, payload = self._objective.outcome()
        except NoResult as error:
            return AttemptEnded(cause=Cause.ERROR, detail=str(error))
        return Outcome(status=status, payload=payload)


def _split(report: dict[str, object], line: int) -> tuple[int, dict[str, float]]:
    """Step and metrics of a report; `line` is the step of one that names none."""
    step = report.get("step", line)
    metrics = {
        name: float(value) for name, value in report.items() if name != "step" and isinstance(value, (int, float))
    }
    if not isinstance(step, (int, float)) or step != int(step):
        raise ValueError(f"step is {step!r}, but should be a whole number")
    return int(step), metrics
