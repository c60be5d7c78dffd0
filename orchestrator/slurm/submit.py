"""Handing a sweep over, to Slurm or to this machine: once, whatever dies on the way.

    paths = sweep_folder.prepare(plan, snapshot, sweep_file, runs)      the sweep's folder, whole or not at all
    receipt = submit.submit(paths, plan, on="slurm")    workers, then reducers after them; returns at once
    submit.submit(paths, plan).already                  True: the same sweep submitted twice is submitted once
    submit.resubmit(paths, plan, missing=12)            what is missing, once nothing of the sweep is alive

Each part is announced in the ledger before it is handed over, with the token that goes into its comment or command
line. A submission that was cut off is completed by the same call: parts in doubt are looked up by that token, parts
that are missing are handed over, parts that are there stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orchestrator.config.plan import blocks
from orchestrator.core import permissions
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process import cores
from orchestrator.errors import UsageError
from orchestrator.slurm import commands, ledger
from orchestrator.slurm.jobs import Live, live, mark_cancelled
from orchestrator.slurm.ledger import On, Submission, SubmissionPart
from orchestrator.slurm.submission import LOCAL, Submitter, reducers, render, request
from orchestrator.slurm.sweep_folder import locked

if TYPE_CHECKING:
    from orchestrator.config.spec import SweepSpec
    from orchestrator.core.atomic import Json

__all__ = ["Planned", "Receipt", "check", "resubmit", "submit"]


class Planned(Protocol):
    """What is needed of a plan: `SweepPlan` and `PlanFile` both have it."""

    @property
    def spec(self) -> SweepSpec: ...  # noqa: D102
    @property
    def num_trials(self) -> int: ...  # noqa: D102


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
    with locked(paths):
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
    handover = Submitter(
        paths=paths,
        spec=spec,
        submission=submission,
        patience=patience,
        is_continued=is_continued,
    )
    done = handover.run()
    return Receipt(submission=done, notes=tuple(handover.notes))


def _submission(
    on: On, parts: tuple[SubmissionPart, ...], epoch: int = 0, supersedes: Sequence[str] = ()
) -> Submission:
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
) -> tuple[SubmissionPart, ...]:
    """The parts that `num_trials` of the plan's trials are worth; with none left, only a reducer works."""
    launch = plan.spec.launch
    if on == "local":
        slots = workers or max(1, cores() // launch.cpus_per_trial)
        return (SubmissionPart(what=LOCAL, num_workers=max(1, min(slots, num_trials))),)
    size = blocks(plan.num_trials, launch.trials_per_task, launch.pack).size
    limits = [limit for limit in (workers, launch.max_workers) if limit is not None]
    return _arrays(plan, min([-(-num_trials // size), *limits]), patience)


def _arrays(plan: Planned, num_workers: int, patience: commands.Patience) -> tuple[SubmissionPart, ...]:
    from orchestrator.slurm.script import arrays

    limit = int(commands.config(patience=patience).get("MaxArraySize", "1001"))
    layout = enumerate(arrays(num_workers, limit))
    workers = (
        SubmissionPart(what=f"workers-{k}", first_worker=first, num_workers=count) for k, (first, count) in layout
    )
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
    part: SubmissionPart,
    folder: Path,
    patience: commands.Patience,
) -> str:
    script = folder / f"{part.what}.sh"
    script.write_bytes(render(request(paths, spec, submission, part)))
    return f"{part.what}: {commands.check(script, patience=patience)}"


# Afterwards


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
    with locked(paths):
        before = ledger.submissions(paths)
        # What was cancelled is ending, and takes no further trial: nobody need wait for it.
        alive = [job for job in live(paths, patience=patience) if not ledger.is_cancelled(paths, job.token)]
        if alive and not force:
            return _still_alive(paths, spec, before[-1], alive, patience)
        if ledger.cancelled_epoch(paths) is not None:
            # Renewed, so that a mark that nobody can read doesn't end the new epoch as well.
            mark_cancelled(paths)
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
