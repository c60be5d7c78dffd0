"""The ledger of submissions: what was about to be handed over, and what came of it. Cheap to read.

    ledger.current(paths)               the newest submission, with its parts and their jobs; None before the first
    ledger.is_cancelled(paths, token)   whether `orc cancel` has ended the submission with this token

`submissions.jsonl` holds checked lines of three kinds. An **intent** is durable before anything is handed over and
names the submission's token, its epoch and all of its parts; a **submitted** line says which job or process a part
became; a **rejected** line says why it became none. A part with an intent and nothing else may or may not exist: it is
looked up by its comment, or by the token among the arguments of processes, before it is tried again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from orchestrator.core import atomic
from orchestrator.core.process import Process
from orchestrator.errors import OrcError

if TYPE_CHECKING:
    from orchestrator.core.atomic import Json, JsonObject
    from orchestrator.core.paths import SweepPaths

__all__ = [
    "On",
    "Submission",
    "SubmissionPart",
    "append",
    "cancelled_epoch",
    "comment_of",
    "current",
    "find",
    "intent",
    "is_cancelled",
    "rejected",
    "submissions",
    "submitted_job",
    "submitted_process",
]

On: TypeAlias = Literal["slurm", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionPart:
    """One script or process of a submission.

    Args:
        what: its name: `workers-0`, `workers-1`, ..., `reduce-0`, `reduce-1`, ... (levels of a tree of reducers, each
            an array), `reducer`, or `local`.
        first_worker: number of its first worker.
        num_workers: elements of its array, 0 for a job that is none; trials at a time for `local`.
        asked: whether an intent to hand it over was written down.
        job: Slurm's id of the job or the array.
        cluster: Slurm's name of the cluster, where there are several.
        name: the job's name.
        process: what it became on this machine.
        error: why it was rejected.
    """

    what: str
    first_worker: int = 0
    num_workers: int = 0
    asked: bool = False
    job: str | None = None
    cluster: str | None = None
    name: str | None = None
    process: Process | None = None
    error: str | None = None

    @property
    def is_reducer(self) -> bool:
        """Whether it runs no trials, and comes after what does."""
        return self.what.startswith("reduce")

    @property
    def is_done(self) -> bool:
        """Whether it is known to be handed over."""
        return self.job is not None or self.process is not None

    @property
    def is_in_doubt(self) -> bool:
        """Whether it may have been handed over without a word of it in the ledger."""
        return self.asked and not self.is_done and self.error is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Workers and reducer that were handed over together.

    Args:
        token: 32 random hexadecimal digits, in every comment and command line of it.
        epoch: 0 for the first submission, one more for each resumption.
        on: where it runs.
        host: the machine that submitted it.
        parts: all of them, handed over or not.
        supersedes: tokens of earlier submissions that were seen dead when this one began.
        retry_failed: whether its workers run trials again that failed under those.
    """

    token: str
    epoch: int
    on: On
    host: str
    parts: tuple[SubmissionPart, ...]
    supersedes: tuple[str, ...] = ()
    retry_failed: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every part is known to be handed over."""
        return all(part.is_done for part in self.parts)

    @property
    def num_workers(self) -> int:
        """Workers of all parts together."""
        return sum(part.num_workers for part in self.parts if not part.is_reducer)

    @property
    def num_arrays(self) -> int:
        """How many parts hold workers."""
        return sum(not part.is_reducer for part in self.parts)


def comment_of(token: str, what: str) -> str:
    """What `sbatch --comment` says of a part, so that a part whose answer was lost is found again."""
    return f"orc:{token}:{what}"


def intent(submission: Submission, what: str, *, script: str | None = None) -> JsonObject:
    """The line that goes before handing over part `what`."""
    parts: list[Json] = [[part.what, part.first_worker, part.num_workers] for part in submission.parts]
    return {
        "kind": "intent",
        "submission": submission.token,
        "epoch": submission.epoch,
        "on": submission.on,
        "host": submission.host,
        "what": what,
        "script": script,
        "parts": parts,
        "supersedes": list(submission.supersedes),
        "retry_failed": submission.retry_failed,
    }


def submitted_job(token: str, what: str, *, job: str, cluster: str | None, name: str, time_s: float) -> JsonObject:
    """The line that says which job a part became; `time_s` in seconds since 1970, of the submitting machine."""
    return {
        "kind": "submitted",
        "submission": token,
        "what": what,
        "job": job,
        "cluster": cluster,
        "name": name,
        "submit_time": time_s,
    }


def submitted_process(token: str, what: str, process: Process) -> JsonObject:
    """The line that says which process a part became."""
    return {"kind": "submitted", "submission": token, "what": what, "process": process.to_json()}


def rejected(token: str, what: str, error: str) -> JsonObject:
    """The line that says why a part became nothing."""
    return {"kind": "rejected", "submission": token, "what": what, "error": error}


def append(paths: SweepPaths, entry: JsonObject) -> None:
    """Add a line; it is on the disk when this returns. A torn line before it, of a writer that died, stays apart.

    Raises:
        OrcError: the ledger can't be written; names it.
    """
    try:
        handle = os.open(paths.submissions, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            _write(handle, b"\n" * torn + atomic.checked(entry), paths.submissions)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise OrcError(f"{paths.submissions}: can't be appended to: {error.strerror}") from error


def _write(handle: int, data: bytes, path: Path) -> None:
    written = os.write(handle, data)
    if written != len(data):
        raise OrcError(f"{path}: only {written} of {len(data)} bytes could be written: is the disk full?")


def _entries(paths: SweepPaths) -> Iterator[JsonObject]:
    for _, line in atomic.lines(paths.submissions):
        entry = atomic.unchecked(line)
        if entry is not None:
            yield entry


def submissions(paths: SweepPaths) -> list[Submission]:
    """Every submission of the sweep, oldest first."""
    found: dict[str, Submission] = {}
    for entry in _entries(paths):
        match entry:
            case {"kind": "intent", "submission": str(token)}:
                found[token] = _intended(found.get(token), token, entry)
            case {"kind": "submitted" | "rejected", "submission": str(token)} if token in found:
                found[token] = _with_result(found[token], entry)
    return sorted(found.values(), key=lambda submission: submission.epoch)


def _intended(before: Submission | None, token: str, entry: JsonObject) -> Submission:
    """The layout may have changed since an earlier intent (fewer workers): the last one counts, results are kept."""
    match entry:
        case {"epoch": int(epoch), "on": "slurm" | "local" as on, "what": str(what), "parts": list(rows)}:
            known = {part.what: part for part in before.parts} if before else {}
            parts = tuple(_laid_out(row, what, known) for row in rows)
            supersedes = entry.get("supersedes")
            return Submission(
                token=token,
                epoch=epoch,
                on=on,
                host=str(entry.get("host")),
                parts=parts,
                supersedes=tuple(map(str, supersedes)) if isinstance(supersedes, list) else (),
                retry_failed=entry.get("retry_failed") is True,
            )
    raise OrcError(f"the ledger holds an intent that this version does not understand: {entry!r}")


def _laid_out(row: Json, what: str, known: dict[str, SubmissionPart]) -> SubmissionPart:
    match row:
        case [str(name), int(first), int(count)]:
            part = replace(known.get(name, SubmissionPart(what=name)), first_worker=first, num_workers=count)
            return replace(part, asked=True, error=None) if name == what else part
    raise OrcError(f"the ledger holds a part that this version does not understand: {row!r}")


def _with_result(submission: Submission, entry: JsonObject) -> Submission:
    parts = (_result(part, entry) if part.what == entry.get("what") else part for part in submission.parts)
    return replace(submission, parts=tuple(parts))


def _result(part: SubmissionPart, entry: JsonObject) -> SubmissionPart:
    match entry:
        case {"process": dict(process)}:
            return replace(part, error=None, process=Process.from_json(process))
        case {"job": str(job), "cluster": None | str() as cluster, "name": str(name)}:
            return replace(part, error=None, job=job, cluster=cluster, name=name)
        case {"error": str(error)}:
            return replace(part, error=error)
    raise OrcError(f"the ledger holds a result that this version does not understand: {entry!r}")


def current(paths: SweepPaths) -> Submission | None:
    """The submission of the newest epoch; None before the first."""
    return max(submissions(paths), key=lambda submission: submission.epoch, default=None)


def find(paths: SweepPaths, token: str) -> Submission | None:
    """The submission with this token."""
    return next((submission for submission in submissions(paths) if submission.token == token), None)


def cancelled_epoch(paths: SweepPaths) -> int | None:
    """The newest epoch that `orc cancel` has ended; None where nothing was cancelled.

    A mark that can't be read counts as one for every epoch: someone wanted the sweep to end.
    """
    try:
        text = paths.cancelled.read_text()
    except FileNotFoundError:
        return None
    except OSError:
        return _EVERY
    return int(text) if text.strip().isdigit() else _EVERY


_EVERY = 2**62


def is_cancelled(paths: SweepPaths, token: str) -> bool:
    """Whether the submission with this token is to end; an unknown token follows the newest epoch."""
    ended = cancelled_epoch(paths)
    if ended is None:
        return False
    submission = find(paths, token) or current(paths)
    return submission is None or submission.epoch <= ended
