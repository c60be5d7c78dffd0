"""One submission on its way to Slurm or to this machine, part by part, with the ledger ahead of every step.

    Submitter(paths=paths, spec=spec, submission=submission).run()     hands over every part that isn't handed over
    reducers(spec, num_trials)                                        the parts that reduce, the last one the root

A part is announced, handed over, and noted. Whatever dies between two of these leaves a part in doubt, which the next
`Submitter` of the same submission looks up by its token before it tries again.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from orchestrator.core import atomic, process_tree
from orchestrator.core.process import Process, find_processes, spawn
from orchestrator.errors import OrcError, SbatchRejected, UsageError
from orchestrator.results.reduction_tree.tree import Tree
from orchestrator.slurm import commands, environment, ledger
from orchestrator.slurm.ledger import SubmissionPart

if TYPE_CHECKING:
    from orchestrator.config.spec import SweepSpec
    from orchestrator.core.paths import SweepPaths
    from orchestrator.slurm.ledger import Submission
    from orchestrator.slurm.script import ReducerRequest

__all__ = ["LOCAL", "REDUCER", "Submitter", "reducers", "render", "request"]

REDUCER = "reducer"
LOCAL = "local"
_LEVEL = "reduce-"


def reducers(spec: SweepSpec, num_trials: int, max_array_size: int | None = None) -> tuple[SubmissionPart, ...]:
    """The parts that reduce: arrays for the levels of the tree, if there is one, and the job that writes the summary.

    Args:
        spec: the sweep.
        num_trials: of the plan.
        max_array_size: elements that an array of this Slurm holds.
    """
    tree = Tree.of(num_trials, spec.reduce, max_array_size)
    levels = tree.levels if spec.reduce.ranks == 1 else ()
    arrays = (SubmissionPart(what=f"{_LEVEL}{level}", num_workers=count) for level, count in enumerate(levels))
    return (*arrays, SubmissionPart(what=REDUCER))


@dataclass(slots=True, kw_only=True)
class Submitter:
    """One submission on its way. The ledger is the truth; `submission` is what it says.

    Args:
        paths: of the sweep.
        spec: with the sbatch options that are wanted now.
        submission: with the layout that is wanted now.
        patience: with Slurm.
        is_continued: an earlier command has begun it.
        rows: the queue, once it was asked for.
        notes: for the user.
    """

    paths: SweepPaths
    spec: SweepSpec
    submission: Submission
    patience: commands.Patience = commands.PATIENCE
    is_continued: bool = False
    rows: list[commands.JobRow] | None = None
    notes: list[str] = field(default_factory=list)

    def run(self) -> Submission:
        """Hand over every part that isn't handed over, and return what the submission has become.

        Raises:
            SbatchRejected: sbatch refused a part; parts before it stay handed over, and the text says so.
            SlurmUnreachable: no Slurm, or no answer; the same call completes the submission later.
            UsageError: it was cancelled meanwhile.
        """
        num_wanted, parts = self.submission.num_workers, self.submission.parts
        num_reducers = sum(part.is_reducer for part in parts)
        self._make_room()
        while part := next((part for part in self.submission.parts if not part.is_done), None):
            if (ended := ledger.cancelled_epoch(self.paths)) is not None and self.submission.epoch <= ended:
                raise UsageError(f"{self.paths.id}: was cancelled; `orc resume {self.paths.id}` starts it again")
            if self.submission.on == "local":
                self._start(part)
            else:
                self._hand_to_slurm(part)
        if self.submission.num_workers < num_wanted:
            self.notes.append(
                f"{self.submission.num_workers} workers instead of {num_wanted}, since Slurm limits how many jobs you "
                "may have in the queue; the trials are the same"
            )
        if sum(part.is_reducer for part in self.submission.parts) < num_reducers:
            self.notes.append(
                "fewer reducers than planned, since Slurm limits how many jobs you may have in the queue; the last one "
                "does their work"
            )
        return self.submission

    # This machine

    def _start(self, part: SubmissionPart) -> None:
        token = self.submission.token
        if part.is_in_doubt and self.submission.host != os.uname().nodename:
            raise OrcError(f"{self.paths.id}: is being submitted on {self.submission.host}; run the same command there")
        found = find_processes(token) if part.is_in_doubt else []
        if not found:
            self._announce(part, script=None)
            argv = _supervisor(self.paths, token, part.num_workers)
            log = self.paths.logs / f"local-{token[:8]}.log"
            found = [spawn(argv, output=log, env=_environment())]
        self._note_result(part, process=found[0])

    # Slurm

    def _hand_to_slurm(self, part: SubmissionPart) -> None:
        name = self._request(part).job_name
        row = self._look_up(part) if part.is_in_doubt else None
        job = commands.JobId(id=row.array_job_id, cluster=row.cluster) if row else self._sbatch(part)
        if job is not None:
            self._note_result(part, job=job, name=name)

    def _look_up(self, part: SubmissionPart) -> commands.JobRow | None:
        comment = ledger.comment_of(self.submission.token, part.what)
        return next((row for row in self._queue() if row.comment == comment), None)

    def _queue(self) -> list[commands.JobRow]:
        if self.rows is None:
            self.rows = commands.queue(patience=self.patience)
        return self.rows

    def _sbatch(self, part: SubmissionPart) -> commands.JobId | None:
        """The job, or None when the part has to be tried again with fewer workers."""
        script = self.paths.script(_script_name(part, self.submission.epoch))
        atomic.write(script, render(self._request(part)), mode=0o700)
        self._announce(part, script=script.name)
        comment = ledger.comment_of(self.submission.token, part.what)
        dependency = self._dependency() if part.is_reducer else None
        try:
            return commands.sbatch(script, comment=comment, dependency=dependency, patience=self.patience)
        except SbatchRejected as error:
            ledger.append(self.paths, ledger.rejected(self.submission.token, part.what, str(error)))
            self._shrink(part, error)
            return None

    def _dependency(self) -> str | None:
        """After every part before it; those that an earlier command submitted count only while Slurm knows them."""
        jobs = [part.job for part in self.submission.parts if part.job is not None]
        if self.is_continued:
            known = {row.array_job_id for row in self._queue() if row.is_live}
            jobs = [job for job in jobs if job in known]
        return f"afterany:{':'.join(jobs)}" if jobs else None

    def _request(self, part: SubmissionPart) -> ReducerRequest:
        return request(self.paths, self.spec, self.submission, part)

    def _shrink(self, part: SubmissionPart, error: SbatchRejected) -> None:
        """Lay the submission out with fewer workers, or without a tree of reducers, if that is what sbatch minds.

        Raises:
            SbatchRejected: it is not, or there is nothing left to take away.
        """
        accepted = tuple(other for other in self.submission.parts if other.is_done)
        is_over = commands.is_over_limit(error)
        if part.is_reducer and accepted and not (is_over and part.what != REDUCER):
            raise SbatchRejected(_without_reducer(accepted, error)) from error
        if part.what == REDUCER or not is_over:
            raise error
        waiting = [other for other in self.submission.parts if other.is_reducer and not other.is_done]
        if part.is_reducer:
            self._lay_out(*accepted, waiting[-1])
        else:
            self._shrink_workers(part, error, accepted, waiting)

    def _shrink_workers(
        self,
        part: SubmissionPart,
        error: SbatchRejected,
        accepted: tuple[SubmissionPart, ...],
        reducers: list[SubmissionPart],
    ) -> None:
        """Fewer workers, so that the reducers find room; with no room for a tree, the root alone."""
        room = self._room()
        if room is not None and room <= _num_jobs(reducers):
            reducers = reducers[-1:]
        # Where the limit is unknown: half, or none beside arrays that were accepted.
        left = (0 if accepted else part.num_workers // 2) if room is None else room - _num_jobs(reducers)
        count = max(0, min(part.num_workers - 1, left))
        if count < 1 and not accepted:
            raise error
        fewer = (replace(part, num_workers=count, asked=True, error=str(error)),) if count else ()
        self._lay_out(*accepted, *fewer, *reducers)

    def _make_room(self) -> None:
        """Fewer workers from the start, where a tree of reducers would find no room behind them.

        An array that has been taken can't be shrunk. For a single reducer this isn't worth another command of Slurm's.
        """
        workers = [part for part in self.submission.parts if not part.is_reducer]
        reducers = [part for part in self.submission.parts if part.is_reducer]
        if len(reducers) < 2 or any(part.asked for part in self.submission.parts) or (room := self._room()) is None:
            return
        if room <= _num_jobs(reducers):
            reducers = reducers[-1:]
        self._lay_out(*_fitting(workers, room - _num_jobs(reducers)), *reducers)

    def _room(self) -> int | None:
        """How many more jobs the limit leaves; None where it is unknown."""
        limit = commands.submit_limit(patience=self.patience)
        if limit is None:
            return None
        self.rows = None
        return limit - sum(row.is_live for row in self._queue())

    def _lay_out(self, *parts: SubmissionPart) -> None:
        self.submission = replace(self.submission, parts=parts)

    # The ledger

    def _announce(self, part: SubmissionPart, script: str | None) -> None:
        entry = ledger.intent(self.submission, part.what, script=script)
        ledger.append(self.paths, entry)

    def _note_result(
        self, part: SubmissionPart, *, process: Process | None = None, job: commands.JobId | None = None, name: str = ""
    ) -> None:
        token = self.submission.token
        if process is not None:
            entry = ledger.submitted_process(token, part.what, process)
            done = replace(part, asked=True, error=None, process=process)
        else:
            assert job is not None
            entry = ledger.submitted_job(
                token, part.what, job=job.id, cluster=job.cluster, name=name, time_s=round(time.time(), 3)
            )
            done = replace(part, asked=True, error=None, job=job.id, cluster=job.cluster, name=name)
        ledger.append(self.paths, entry)
        parts = tuple(done if other.what == part.what else other for other in self.submission.parts)
        self.submission = replace(self.submission, parts=parts)


def request(paths: SweepPaths, spec: SweepSpec, submission: Submission, part: SubmissionPart) -> ReducerRequest:
    """What the script of `part` needs.

    Raises:
        UsageError: a path or an option that a script can't say.
    """
    from orchestrator.slurm.script import LevelRequest, ReducerRequest, WorkersRequest

    ranges = next((other.num_workers for other in submission.parts if other.what == f"{_LEVEL}0"), 1)
    plain = ReducerRequest(
        spec=spec,
        sweep_id=paths.id,
        root=str(paths.root),
        python=sys.executable,
        token=submission.token,
        epoch=submission.epoch,
        num_ranges=ranges,
    )
    if part.what == REDUCER:
        return plain
    if part.is_reducer:
        level = int(part.what.removeprefix(_LEVEL))
        return LevelRequest.of(plain, level=level, num_reducers=part.num_workers)
    return WorkersRequest.of(
        plain, num_workers=part.num_workers, first_worker=part.first_worker, num_arrays=submission.num_arrays
    )


def render(wanted: ReducerRequest) -> bytes:
    """The script's bytes."""
    from orchestrator.slurm.script import WorkersRequest, render_reducer, render_workers

    text = render_workers(wanted) if isinstance(wanted, WorkersRequest) else render_reducer(wanted)
    return text.encode()


def _fitting(workers: list[SubmissionPart], room: int) -> list[SubmissionPart]:
    """The first of the workers, as many as there is room for; with no room at all, all of them: sbatch says no best."""
    if room < 1:
        return workers
    starts = itertools.accumulate((part.num_workers for part in workers), initial=0)
    left = [(part, room - start) for part, start in zip(workers, starts, strict=False)]
    return [replace(part, num_workers=min(part.num_workers, most)) for part, most in left if most > 0]


def _num_jobs(parts: list[SubmissionPart]) -> int:
    """What of a limit on jobs the parts use up: each element of an array counts."""
    return sum(max(1, part.num_workers) for part in parts)


def _script_name(part: SubmissionPart, epoch: int) -> str:
    """Later epochs keep the scripts of earlier ones: they are what was handed to sbatch."""
    return part.what if epoch == 0 else f"{part.what}.{epoch}"


def _without_reducer(accepted: tuple[SubmissionPart, ...], error: SbatchRejected) -> str:
    jobs = ", ".join(str(part.job) for part in accepted)
    return (
        f"{error}\nThe workers are submitted (job {jobs}) and will do every trial; only the reducer is missing. Run "
        "the same command again to submit just the reducer; results can be read at any time without it"
    )


def _supervisor(paths: SweepPaths, token: str, slots: int) -> list[str]:
    argv = [sys.executable, "-P", "-m", "orchestrator.supervisor", "work", "--dir", str(paths.root)]
    return [*argv, "--submission", token, "--slots", str(slots), "--then-reduce"]


def _environment() -> dict[str, str]:
    """Of a supervisor on this machine: not in any job, and with search paths that mean the same in its folder."""
    env = environment.outside()
    if process_tree.MARK in os.environ:  # so that what a trial starts is known as that trial's
        env[process_tree.MARK] = os.environ[process_tree.MARK]
    if search := env.get("PYTHONPATH"):
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in search.split(os.pathsep))  # noqa: PTH100
    return env
