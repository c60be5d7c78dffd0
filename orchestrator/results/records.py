"""Records: what one process start saw, one line at a time, in a file of its own.

    writer    who writes: submission, job, host, versions, and the file that this one continues; always the first line
    start     an attempt at a trial; durable before the user's code runs
    report    metrics at a step
    outcome   complete, diverged, pruned or failed, with the payload that counts
    end       an attempt that ended without an outcome, its cause, and the step that it has saved
    at        where a trial is, and the last step that is saved, now and then
    resume    where an attempt after the first goes on
    notice    a signal that arrived, and what was done about it
    beat      nothing new, but still alive

A line is data and never changes. Which outcome of a trial counts is decided when reading (`fold`), so duplicates do no
harm.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from orchestrator.core.atomic import LONGEST, AppendFile, Json, JsonObject, TooLong
from orchestrator.core.messages import Cause, Status
from orchestrator.core.paths import SweepPaths
from orchestrator.errors import OrcError

__all__ = [
    "Cause", "RecordWriter", "Seen", "Status", "Unrecordable",
    "at", "brief", "end", "files", "look", "notice", "outcome", "report", "resume", "start",
]  # fmt: skip

SYNC_AGE_S = 0.5
"""Longest time that an outcome waits for the disk, in seconds."""
_IS_RECORD_FILE = re.compile(r"[0-9a-f]{32}\.jsonl").fullmatch
_MOST_TEXT = 4000
"""Characters of a text that came from a job, such as that of its error: the log has all of it."""


def start(*, trial: int, attempt: int) -> JsonObject:
    """An attempt at `trial` (its index), the `attempt`-th from 0.

    The starts of a block are written together, in the order in which its trials run: of those without outcome or end,
    the first ones, as many as the writer has slots, are those that were running. Those of a pack are written when it
    begins, by a writer that has a slot for each trial of each pack.
    """
    return {"kind": "start", "trial": trial, "attempt": attempt}


def report(*, trial: int, attempt: int, step: int, metrics: JsonObject) -> JsonObject:
    """Metrics at a step of a trial."""
    return {"kind": "report", "trial": trial, "attempt": attempt, "step": step, "metrics": metrics}


def outcome(*, trial: int, attempt: int, status: Status, payload: JsonObject, seconds: float) -> JsonObject:
    """The outcome of a trial. `payload` is what counts: it holds no clock, host, path or attempt."""
    return {
        "kind": "outcome",
        "trial": trial,
        "attempt": attempt,
        "status": status.value,
        "payload": payload,
        "seconds": round(seconds, 4),
    }


def end(
    *, trial: int, attempt: int, cause: Cause, detail: str, begun: bool = True, step: int | None = None
) -> JsonObject:
    """An attempt that ended without an outcome, such as by a signal; `detail` says which.

    One that had not `begun` is charged to nobody. `step` is the one at which it has saved and left.
    """
    line: JsonObject = {"kind": "end", "trial": trial, "attempt": attempt, "cause": cause.value, "detail": detail}
    if step is not None:
        line["step"] = step
    return line if begun else {**line, "begun": False}


def at(*, trial: int, attempt: int, step: int, saved: int | None) -> JsonObject:
    """Where a trial is in training, and the last step of which a checkpoint is durable."""
    return {"kind": "at", "trial": trial, "attempt": attempt, "step": step, "saved": saved}


def resume(*, trial: int, attempt: int, step: int, lead: int | None = None) -> JsonObject:
    """An attempt after the first goes on from `step`, or begins anew at 0.

    The lines that tell where a pack is name its `lead` alone.
    """
    line: JsonObject = {"kind": "resume", "trial": trial, "attempt": attempt, "step": step}
    return line if lead in (None, trial) else {**line, "lead": lead}


def notice(*, signal: str, state: str, action: str) -> JsonObject:
    """A signal that asked the writer to leave, what Slurm said of the job then, and what was done."""
    return {"kind": "notice", "signal": signal, "state": state, "action": action}


def brief(text: str) -> str:
    """A text as a record holds it: of a long one, the begin and the end."""
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[: _MOST_TEXT // 2]} … {text[-_MOST_TEXT // 2 :]}"


class Seen(NamedTuple):
    """A record file as a folder shows it.

    Args:
        size: in bytes.
        changed_ns: when it was last written to, by the clock of the file system.
    """

    size: int
    changed_ns: int


def look(paths: SweepPaths) -> dict[str, Seen]:
    """The record files that are there, by name: regular files that are called like one; whatever else is there is none.

    Raises:
        FileNotFoundError: there is no folder of records.
    """
    found: dict[str, Seen] = {}
    with os.scandir(paths.records) as entries:
        for entry in entries:
            if _IS_RECORD_FILE(entry.name) and entry.is_file(follow_symlinks=False):
                state = entry.stat(follow_symlinks=False)
                found[entry.name] = Seen(size=state.st_size, changed_ns=state.st_mtime_ns)
    return found


def files(paths: SweepPaths) -> list[Path]:
    """The record files, in the order of their names.

    Raises:
        FileNotFoundError: there is no folder of records.
    """
    return [paths.records / name for name in sorted(look(paths))]


class Unrecordable(OrcError):
    """What was to be recorded is longer than a line may be; nothing of it was written, and the writer is good."""


class RecordWriter:
    """The record file of this process start.

    Lines reach the kernel at once and the disk within `SYNC_AGE_S`; `durable=True` waits for the disk. After a failed
    or short write the file is abandoned and another one is started, so a torn line is always the last of its file.

    Args:
        paths: the sweep.
        identity: what the first line says of this process besides its kind and writer id.
        beat_s: a beat is written after this many seconds without another line.
    Raises:
        OrcError: also the replacement could not be written (disk full, folder gone); names the path.
    """

    def __init__(
        self,
        paths: SweepPaths,
        identity: JsonObject,
        *,
        beat_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = paths
        self._identity = identity
        self._beat_s = beat_s
        self._clock = clock
        self._dirty_since: float | None = None
        self.writer, self._file = self._open({})
        self._last_line = self._clock()

    def _open(self, continues: JsonObject) -> tuple[str, AppendFile]:
        writer = os.urandom(16).hex()
        file = AppendFile(self._paths.record(writer))
        try:
            file.append({"kind": "writer", "writer": writer, **continues, **self._identity})
            file.sync()
        except OrcError:
            with contextlib.suppress(OrcError):
                file.close()
            raise
        return writer, file

    def append(self, *lines: JsonObject, durable: bool = False, lasting: bool = True) -> None:
        """Write lines; with `durable`, return once they are on the disk. Those not `lasting` go there with others.

        Raises:
            Unrecordable: one of the lines is too long for whoever would read it; says whose it is. None is written.
        """
        if not lines:
            return
        try:
            self._append(lines, durable, lasting)
        except TooLong as error:
            raise Unrecordable(_unrecordable(error)) from error
        except OrcError:
            self._abandon()
            # Claims and starts name the old file, so the new one says whose they are now.
            self.writer, self._file = self._open({"continues": self.writer})
            self._append(lines, durable, lasting)

    def _abandon(self) -> None:
        # Its earlier lines stay good, and should reach the disk like any other.
        with contextlib.suppress(OrcError):
            self._file.close()

    def _append(self, lines: tuple[JsonObject, ...], durable: bool, lasting: bool) -> None:
        self._file.append(*lines)
        self._last_line = self._clock()
        if durable:
            self.sync()
        elif lasting and self._dirty_since is None:
            self._dirty_since = self._last_line

    @property
    def is_dirty(self) -> bool:
        """Whether some lines may not be on the disk yet."""
        return self._dirty_since is not None

    def sync(self) -> None:
        """Return once every line is on the disk."""
        self._file.sync()
        self._dirty_since = None

    def tick(self) -> float:
        """Do what is due: sync old lines, beat when silent. Returns the seconds until something is due again."""
        now = self._clock()
        if self._dirty_since is not None and now - self._dirty_since >= SYNC_AGE_S:
            self.sync()
        if now - self._last_line >= self._beat_s:
            self.append({"kind": "beat"})
        until_beat = self._last_line + self._beat_s - now
        return until_beat if self._dirty_since is None else min(until_beat, self._dirty_since + SYNC_AGE_S - now)

    def close(self) -> None:
        """Make everything durable."""
        self.sync()
        self._file.close()
        self._dirty_since = None


def _unrecordable(error: TooLong) -> str:
    line, size = error.value, error.num_bytes / 2**20
    return (
        f"trial {line.get('trial')}, attempt {line.get('attempt')}: its {line.get('kind')} takes {size:.1f} MiB, and a "
        f"record holds {LONGEST / 2**20:g} MiB at most: report fewer metrics at once, or write such data to a file"
    )


def as_index(value: Json) -> int:
    """A trial index or attempt from a record; -1 when it isn't a number."""
    return value if isinstance(value, int) else -1
