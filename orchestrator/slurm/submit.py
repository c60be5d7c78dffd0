"""Handing a sweep over, to Slurm or to this machine: once, whatever dies on the way.

    paths = submit.prepare(plan, snapshot, sweep_file, runs)      the sweep's folder, whole or not at all
    receipt = submit.submit(paths, plan, on="slurm")              workers, then reducers after them; returns at once
    submit.submit(paths, plan).already                            True: the same sweep submitted twice is submitted once
    submit.live(paths), submit.cancel(paths), submit.resubmit(paths, plan, missing=12)

Each part is announced in the ledger before it is handed over, with the token that goes into its comment or command
line. A submission that was cut off is completed by the same call: parts in doubt are looked up by that token, parts
that are missing are handed over, parts that are there stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orchestrator.config.plan import PlanFile, SweepPlan, blocks, write_plan
from orchestrator.core import atomic, permissions
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process import Process, cores, find_processes
from orchestrator.errors import FolderError, OrcError, UsageError
from orchestrator.slurm import commands, ledger
from orchestrator.slurm.ledger import On, Part, Submission
from orchestrator.slurm.submission import LOCAL, Handover, reducers, render, request

if TYPE_CHECKING:
    from orchestrator.config.snapshot import Snapshot
    from orchestrator.config.spec import SweepSpec
    from orchestrator.core.atomic import Json

__all__ = ["Live", "Planned", "Receipt", "cancel", "check", "live", "prepare", "resubmit", "seen", "submit"]

_LOCK_S = 120.0


class Planned(Protocol):
    """What is needed of a plan: `SweepPlan` and `PlanFile` both have it."""

    @property
    def spec(self) -> SweepSpec: ...  # noqa: D102
    @property
    def num_trials(self) -> int: ...  # noqa: D102


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What came of handing over.

    Args:
        submission: the one that is in force now; None only when `alive` kept a first one from being made.
        already: nothing new was handed over.
        notes: what the user should know, a sentence each.
        alive: what kept a resumption from starting.
    """

    submission: Submission | None
    already: bool = False
    notes: tuple[str, ...] = ()
    alive: tuple[Live, ...] = ()


# The folder


def prepare(plan: SweepPlan, snapshot: Snapshot, sweep_file: bytes, runs: Path) -> SweepPaths:
    """The sweep's folder below `runs`: made whole, or found whole from an earlier time.

    Args:
        plan: its id names the folder.
        snapshot: the code that the plan was made with.
        sweep_file: the sweep file's bytes as the user gave them.
        runs: the folder of sweeps; made when missing, then with a `.gitignore` for everything in it.

    Raises:
        FolderError: `runs` is not writable, or there is a folder of that name that is not this sweep, or not ours.
    """
    assert snapshot.digest == plan.code, "the plan is of other code"
    paths = SweepPaths(runs.absolute() / plan.id)
    if paths.root.exists():
        return _same(paths, plan)
    _make_runs(paths.root.parent)
    temporary = SweepPaths(paths.root.with_name(f".{plan.id}.{os.urandom(6).hex()}"))
    try:
        _fill(temporary, plan, snapshot, sweep_file)
        return _publish(temporary, paths, plan)
    except OSError as error:
        raise FolderError(f"{runs}: no sweep can be stored here: {error.strerror}; use --dir or $ORC_DIR") from error
    finally:
        _remove(temporary.root)


def _publish(temporary: SweepPaths, paths: SweepPaths, plan: SweepPlan) -> SweepPaths:
    try:
        temporary.root.rename(paths.root)
    except OSError:
        if not paths.plan.exists():
            raise
        # Somebody submitted the same sweep at this very moment, and was first.
        return _same(paths, plan)
    atomic.sync_folder(paths.root.parent)
    return paths


def _make_runs(runs: Path) -> None:
    try:
        runs.mkdir(mode=0o700, parents=True)
        atomic.write(runs / ".gitignore", b"*\n")
    except FileExistsError:
        if not runs.is_dir():
            raise FolderError(f"{runs}: should be a folder for sweeps, but is a file; use --dir or $ORC_DIR") from None
    except OSError as error:
        raise FolderError(f"{runs}: can't be made: {error.strerror}; use --dir or $ORC_DIR") from error


def _fill(paths: SweepPaths, plan: SweepPlan, snapshot: Snapshot, sweep_file: bytes) -> None:
    for folder in paths.folders:
        folder.mkdir(mode=0o700)
    snapshot.copy(paths.code)
    atomic.write(paths.sweep_file, sweep_file)
    atomic.write(paths.origin, os.fsencode(snapshot.root / snapshot.folder))
    atomic.write(paths.submissions, b"")
    write_plan(plan, paths.plan)


def _remove(folder: Path) -> None:
    if folder.exists():
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def _same(paths: SweepPaths, plan: SweepPlan) -> SweepPaths:
    permissions.check(paths)
    found = PlanFile.open(paths.plan)
    if (found.id, found.num_trials, found.code) != (plan.id, plan.num_trials, plan.code):
        raise FolderError(f"{paths.root}: holds another sweep ({found.id}, {found.num_trials} trials); move it away")
    return paths


@contextmanager
def _locked(paths: SweepPaths) -> Iterator[None]:
    """Keeps two commands from doing the same work twice; nothing is wrong without it, so no lock is no error."""
    from filelock import FileLock, Timeout

    lock = FileLock(paths.submit_lock, timeout=_LOCK_S, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise OrcError(
            f"{paths.submit_lock}: another command has been submitting this sweep for {_LOCK_S:g} s; wait for it"
        ) from None
    except (NotImplementedError, OSError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


# Submitting


def submit(
    paths: SweepPaths,
    plan: Planned,
    *,
    on: On = "slurm",
    workers: int | None = None,
    patience: commands.Patience = commands.PATIENCE,
) -> Receipt:
    """Hand the sweep over, unless it was; complete it, if that was cut off. Returns without waiting for any trial.

    Args:
        paths: a prepared folder.
        plan: of this folder; its `spec.slurm` may be newer than the plan's on disk.
        on: Slurm, or this machine.
        workers: how many at most; None for one a block of trials on Slurm, as many as the cores can take here.
        patience: with Slurm.

    Raises:
        SbatchRejected: sbatch refused, in its own words.
        SlurmUnreachable: no Slurm, or no answer; nothing is lost, the same call goes on.
        UsageError: the sweep was cancelled, or can't be said in a script.
        FolderError: the folder is unsafe.
    """
    permissions.check(paths)
    with _locked(paths):
        before = ledger.current(paths)
        if before is None:
            parts = _parts(plan, on, workers, plan.num_trials, patience)
            return _hand_over(paths, plan.spec, _submission(on, parts), patience=patience)
        if ledger.is_cancelled(paths, before.token):
            raise UsageError(f"{paths.id}: was cancelled; `orc resume {paths.id}` starts it again")
        return _complete(paths, plan.spec, before, patience)


def _complete(paths: SweepPaths, spec: SweepSpec, before: Submission, patience: commands.Patience) -> Receipt:
    if before.is_complete:
        return Receipt(submission=before, already=True)
    return _hand_over(paths, spec, before, patience=patience, is_continued=True)


def _hand_over(
    paths: SweepPaths,
    spec: SweepSpec,
    submission: Submission,
    *,
    patience: commands.Patience,
    is_continued: bool = False,
) -> Receipt:
    handover = Handover(
        paths=paths,
        spec=spec,
        submission=submission,
        patience=patience,
        is_continued=is_continued,
    )
    done = handover.run()
    return Receipt(submission=done, notes=tuple(handover.notes))


def _submission(on: On, parts: tuple[Part, ...], epoch: int = 0, supersedes: Sequence[str] = ()) -> Submission:
    return Submission(
        token=os.urandom(16).hex(),
        epoch=epoch,
        on=on,
        host=os.uname().nodename,
        parts=parts,
        supersedes=tuple(supersedes),
    )


def _parts(
    plan: Planned, on: On, workers: int | None, num_trials: int, patience: commands.Patience
) -> tuple[Part, ...]:
    """The parts that `num_trials` of the plan's trials are worth; with none left, only a reducer works."""
    launch = plan.spec.launch
    if on == "local":
        slots = workers or max(1, cores() // launch.cpus_per_trial)
        return (Part(what=LOCAL, num_workers=max(1, min(slots, num_trials))),)
    size = blocks(plan.num_trials, launch.trials_per_task, launch.pack).size
    limits = [limit for limit in (workers, launch.max_workers) if limit is not None]
    return _arrays(plan, min([-(-num_trials // size), *limits]), patience)


def _arrays(plan: Planned, num_workers: int, patience: commands.Patience) -> tuple[Part, ...]:
    from orchestrator.slurm.script import arrays

    limit = int(commands.config(patience=patience).get("MaxArraySize", "1001"))
    layout = enumerate(arrays(num_workers, limit))
    workers = (Part(what=f"workers-{k}", first_worker=first, num_workers=count) for k, (first, count) in layout)
    return (*workers, *reducers(plan.spec, plan.num_trials, limit))


def check(
    paths: SweepPaths, plan: Planned, *, workers: int | None = None, patience: commands.Patience = commands.PATIENCE
) -> list[str]:
    """What `sbatch --test-only` says of each script, a line each. Writes nothing below `paths`, which need not exist.

    Raises:
        SbatchRejected: sbatch would refuse.
        SlurmUnreachable: no Slurm, or no answer.
    """
    import tempfile

    submission = _submission("slurm", _parts(plan, "slurm", workers, plan.num_trials, patience))
    with tempfile.TemporaryDirectory(prefix="orc-") as folder:
        return [_try(paths, plan.spec, submission, part, Path(folder), patience) for part in submission.parts]


def _try(
    paths: SweepPaths,
    spec: SweepSpec,
    submission: Submission,
    part: Part,
    folder: Path,
    patience: commands.Patience,
) -> str:
    script = folder / f"{part.what}.sh"
    script.write_bytes(render(request(paths, spec, submission, part)))
    return f"{part.what}: {commands.check(script, patience=patience)}"


# Afterwards


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
    _mark_cancelled(paths)
    with _locked(paths):
        # Once more: a submission may have begun a new epoch while this waited for it.
        _mark_cancelled(paths)
        alive = live(paths, patience=patience)
        for cluster in {job.cluster for job in alive if job.array_job}:
            ids = {job.array_job: None for job in alive if job.array_job and job.cluster == cluster}
            commands.cancel([job for job in ids if job], cluster=cluster, patience=patience)
        for job in alive:
            if job.process and job.state == "alive":
                job.process.stop(grace_s=grace_s)
        return alive


def _mark_cancelled(paths: SweepPaths) -> None:
    now = ledger.current(paths)
    if now is not None:
        atomic.write(paths.cancelled, f"{now.epoch}\n".encode())


def resubmit(
    paths: SweepPaths,
    plan: Planned,
    *,
    missing: int,
    on: On | None = None,
    workers: int | None = None,
    settings: Mapping[str, Json] | None = None,
    retry_failed: bool = False,
    force: bool = False,
    patience: commands.Patience = commands.PATIENCE,
) -> Receipt:
    """Go on with a sweep: a new epoch with workers for what is missing. While anything of it is alive, none is begun.

    Args:
        paths: of the sweep.
        plan: of this folder.
        missing: trials without an outcome, those to be tried again included; with 0 only the reducer runs.
        on: as before when None.
        workers: as in `submit`.
        settings: sbatch options over those of the plan, by long name.
        retry_failed: whether workers try failed trials again.
        force: begin although something is alive, such as a process of a machine that is no more; harmless, since a
            trial that runs twice counts once. What processes of other machines had claimed is taken over at once.
        patience: with Slurm.

    Returns:
        A receipt whose `alive` is what kept a new epoch from being begun; then nothing new was handed over, but for
        parts of the current submission that were missing.

    Raises:
        SbatchRejected, SlurmUnreachable, UsageError, FolderError: as `submit`.
    """
    permissions.check(paths)
    spec = replace(plan.spec, slurm={**plan.spec.slurm, **(settings or {})})
    with _locked(paths):
        before = ledger.submissions(paths)
        # What was cancelled is ending, and takes no further trial: nobody need wait for it.
        alive = [job for job in live(paths, patience=patience) if not ledger.is_cancelled(paths, job.token)]
        if alive and not force:
            return _still_alive(paths, spec, before[-1], alive, patience)
        if ledger.cancelled_epoch(paths) is not None:
            # Renewed, so that a mark that nobody can read doesn't end the new epoch as well.
            _mark_cancelled(paths)
        where = on or (before[-1].on if before else "slurm")
        living = {job.token for job in alive if not job.is_elsewhere}
        submission = _submission(
            where,
            _parts(plan, where, workers, missing, patience),
            epoch=before[-1].epoch + 1 if before else 0,
            supersedes=[one.token for one in before if one.token not in living],
        )
        return _hand_over(paths, spec, replace(submission, retry_failed=retry_failed), patience=patience)


def _still_alive(
    paths: SweepPaths, spec: SweepSpec, now: Submission, alive: Sequence[Live], patience: commands.Patience
) -> Receipt:
    if now.is_complete or ledger.is_cancelled(paths, now.token) or not any(job.token == now.token for job in alive):
        return Receipt(submission=now, already=True, alive=tuple(alive))
    return replace(_complete(paths, spec, now, patience), alive=tuple(alive))
