"""What of a sweep is alive: its jobs in Slurm and its processes on this machine; and how all of them are cancelled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.core import atomic
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process import Process, find_processes
from orchestrator.slurm import commands, ledger
from orchestrator.slurm.ledger import On, Submission

if TYPE_CHECKING:
    pass
from orchestrator.slurm.sweep_folder import locked

__all__ = ["Live", "cancel", "live", "seen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A job, an array element or a process of a sweep, which as a rule has not ended.

    Args:
        token: of its submission.
        epoch: of its submission.
        what: the part that it is of.
        on: where it runs.
        job: as Slurm's commands take it; of a process, its number.
        state: Slurm's, such as PENDING; of a process `alive`, or `elsewhere` (on a machine that can't be seen).
        reason: why it waits, in Slurm's words; of a process its machine.
        array_job: the array that it is of, or the job itself; None for a process.
        cluster: Slurm's name of the cluster, where there are several.
        process: None for a job.
    """

    token: str
    epoch: int
    what: str
    on: On
    job: str
    state: str
    reason: str = ""
    array_job: str | None = None
    cluster: str | None = None
    process: Process | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is a process of a machine that can't be seen from here, so that nobody knows if it lives."""
        return self.process is not None and self.state == "elsewhere"

    @property
    def has_ended(self) -> bool:
        """Whether it is a job that Slurm still remembers, but that is over."""
        return self.process is None and commands.has_ended(self.state)


def live(paths: SweepPaths, *, patience: commands.Patience = commands.PATIENCE) -> list[Live]:
    """Everything of the sweep that has not ended, of all its submissions: one squeue, none if Slurm was never asked.

    A job counts only if its id and its name or comment are what was written down, or its comment carries one of the
    sweep's tokens: ids are used again.

    Raises:
        SlurmUnreachable: no Slurm, or no answer.
    """
    return [one for one in seen(paths, patience=patience) if not one.has_ended]


def seen(paths: SweepPaths, *, patience: commands.Patience = commands.PATIENCE) -> list[Live]:
    """As `live`, and the jobs that have ended as long as Slurm remembers them (MinJobAge).

    Raises:
        SlurmUnreachable: no Slurm, or no answer.
    """
    found = ledger.submissions(paths)
    jobs: list[Live] = []
    if any(submission.on == "slurm" for submission in found):
        clusters = {part.cluster for submission in found for part in submission.parts if part.cluster}
        rows = commands.queue(clusters=sorted(clusters), patience=patience)
        jobs = [job for row in rows if (job := _job(row, found))]
    return jobs + [process for submission in found for process in _processes(submission)]


def _job(row: commands.JobRow, found: Sequence[Submission]) -> Live | None:
    for submission in found:
        # A part that was tried again without an answer may be there twice: the token tells, whatever the ledger says.
        if row.comment.startswith(ledger.comment_of(submission.token, "")):
            return _live_job(row, submission, row.comment.rpartition(":")[2])
        for part in submission.parts:
            if part.job is not None and (part.job, part.name) == (row.array_job_id, row.name):
                return _live_job(row, submission, part.what)
    return None


def _live_job(row: commands.JobRow, submission: Submission, what: str) -> Live:
    return Live(
        token=submission.token,
        epoch=submission.epoch,
        what=what,
        on="slurm",
        job=row.job_id,
        state=row.state,
        reason=row.reason,
        array_job=row.array_job_id,
        cluster=row.cluster,
    )


def _processes(submission: Submission) -> Iterator[Live]:
    for part in submission.parts:
        doubtful = submission.on == "local" and part.is_in_doubt
        found = find_processes(submission.token) if doubtful else [part.process] if part.process else []
        for process in found:
            if (state := process.state()) != "gone":
                yield Live(
                    token=submission.token,
                    epoch=submission.epoch,
                    what=part.what,
                    on="local",
                    job=str(process.pid),
                    state=state,
                    reason=process.host,
                    process=process,
                )


def cancel(paths: SweepPaths, *, grace_s: float = 30.0, patience: commands.Patience = commands.PATIENCE) -> list[Live]:
    """End every submission of the sweep, for good until `resubmit`; returns what was alive.

    All of it was told to end but for processes of other machines (`Live.is_elsewhere`), which see the mark themselves.

    The durable mark comes first, so that no worker requeues itself after its job was cancelled.

    Args:
        paths: of the sweep.
        grace_s: how long a process of this machine may take to end in order, in seconds.
        patience: with Slurm.

    Raises:
        SlurmUnreachable: no Slurm, or no answer; the mark stays, and the same call cancels later.
    """
    mark_cancelled(paths)
    with locked(paths):
        # Once more: a submission may have begun a new epoch while this waited for it.
        mark_cancelled(paths)
        alive = live(paths, patience=patience)
        for cluster in {job.cluster for job in alive if job.array_job}:
            ids = {job.array_job: None for job in alive if job.array_job and job.cluster == cluster}
            commands.cancel([job for job in ids if job], cluster=cluster, patience=patience)
        for job in alive:
            if job.process and job.state == "alive":
                job.process.stop(grace_s=grace_s)
        return alive


def mark_cancelled(paths: SweepPaths) -> None:
    now = ledger.current(paths)
    if now is not None:
        atomic.write(paths.cancelled, f"{now.epoch}\n".encode())
