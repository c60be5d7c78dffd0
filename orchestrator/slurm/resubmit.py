"""Seeing a sweep on Slurm through from outside: what no job of it can do for itself.

    tender = Resubmitter(sweep, again=submit_what_is_missing, say=print)
    while not tender.is_over():              cheap; asks Slurm now and then
        ...
    end_waits(jobs.live(sweep.paths))      ["12_3"], whose wait after a requeue is over

A job that was preempted where Slurm cancels instead of requeueing, that ran into its time limit on a node without
scontrol, whose node failed with JobRequeue=0, or that was killed without notice, is gone. Its trials are not, and what
is missing is submitted again. Slurm says why a job ended, and forgets it soon; so it is written down first, as an end
of the attempts that the job was at, and the budget of the right cause is charged.

What somebody has cancelled is left alone, and so is a sweep whose workers end again and again without having done
anything. In doubt nothing is submitted: `orc resume` is for that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orchestrator.core import atomic, slurm_env
from orchestrator.errors import SlurmUnreachable
from orchestrator.results import records
from orchestrator.results.records import Cause, RecordWriter, as_index
from orchestrator.slurm import commands, jobs, ledger

if TYPE_CHECKING:
    from orchestrator.config.plan import PlanFile
    from orchestrator.core.atomic import JsonObject
    from orchestrator.core.paths import SweepPaths
    from orchestrator.results.fold import Fold
    from orchestrator.slurm.jobs import Live
    from orchestrator.slurm.ledger import Submission
    from orchestrator.slurm.submit import Receipt

__all__ = ["Resubmitter", "end_waits", "ends", "objection"]

ASK_S = 15.0
"""How often Slurm is asked for the jobs of a sweep, in seconds."""
MOST_FRUITLESS = 3
"""So many submissions in a row may end without an attempt, unless by Slurm's own doing."""
_CAUSES: Mapping[str, Cause] = {
    "PREEMPTED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIMEOUT,
    "NODE_FAIL": Cause.NODE_FAILURE,
    "BOOT_FAIL": Cause.NODE_FAILURE,
    "OUT_OF_MEMORY": Cause.MEMORY,
}
_TELLING = (b'{"kind":"start"', b'{"kind":"end"', b'{"kind":"outcome"')
_SLURMS_DOING = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
_SOMEBODYS_WISH = {"CANCELLED", "DEADLINE", "REVOKED"}

Progress = tuple[int, int, int]


def objection(states: Sequence[str], *, num_workers: int, fruitless: int) -> str | None:
    """Why what is missing must not be submitted again; None if it may.

    Args:
        states: how the jobs of the newest submission's workers ended, in Slurm's words, as far as it remembers.
        num_workers: how many there were.
        fruitless: submissions in a row that ended without an attempt at any trial, and not by Slurm's doing.
    """
    if wishes := sorted(_SOMEBODYS_WISH.intersection(states)):
        return f"a job of it is {wishes[0]}"
    if len(states) < num_workers:
        return "Slurm doesn't say any more how its jobs ended"
    if fruitless >= MOST_FRUITLESS:
        return f"its workers ended {fruitless} times without having done anything; their words are in its logs"
    return None


def end_waits(jobs: Iterable[Live]) -> list[str]:
    """End the wait that Slurm imposes on requeued jobs; returns those that need wait no longer.

    Two minutes is usual, the life of a credential, and it matters to nobody: the next run of the job has a credential
    of its own. A job that waits for the time that its user has set (`begin`) is left alone, and so is every job where
    the site doesn't let its users do this.

    Raises:
        SlurmUnreachable: no Slurm, or no answer.
    """
    return [job.job for job in jobs if _waits(job) and _was_requeued(job) and commands.start_now(job.job)]


def _waits(job: Live) -> bool:
    # Of a job on another cluster, scontrol here knows nothing, or something else.
    return (job.state, job.reason, job.cluster) == ("PENDING", "BeginTime", None)


def _was_requeued(job: Live) -> bool:
    restarts = (commands.show_job(job.job) or {}).get("Restarts", "0")
    return restarts.isdigit() and int(restarts) > 0


class SweepState(Protocol):
    """What is known of a sweep, brought up to date by `refresh`; an `orchestrator.Sweep` is one."""

    @property
    def id(self) -> str:
        """The sweep's name."""
        ...

    @property
    def paths(self) -> SweepPaths:
        """Its files."""
        ...

    @property
    def plan(self) -> PlanFile:
        """Its trials."""
        ...

    @property
    def fold(self) -> Fold:
        """What its records say."""
        ...

    def refresh(self) -> object:
        """Read what is new."""
        ...


class Resubmitter:
    """Sees to one sweep, on Slurm, until it has ended.

    Args:
        sweep: somebody else keeps it up to date.
        again: submits what is missing.
        say: tells the user, a sentence at a time.
        retries: trials that had failed are being tried again, so that none missing does not mean done.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        sweep: SweepState,
        *,
        again: Callable[[], Receipt],
        say: Callable[[str], None],
        retries: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweep = sweep
        self._again = again
        self._say = say
        self._retries = retries
        self._clock = clock
        self._asked_s = clock()
        self._progress = self._look_at_progress()
        self._fruitless = 0
        self._may_end_waits = True

    def is_over(self) -> bool:
        """Whether all is done, or nothing of it is left and nothing more is submitted; asks Slurm now and then.

        Raises:
            SbatchRejected, UsageError, FolderError: what was missing could not be submitted again.
        """
        if not self._retries and not self._sweep.fold.num_missing and self._sweep.paths.summary.exists():
            return True
        if self._clock() - self._asked_s < ASK_S:
            return False
        try:
            return not self._see_to_it(jobs.seen(self._sweep.paths))
        except SlurmUnreachable:
            return False
        finally:
            self._asked_s = self._clock()

    def _see_to_it(self, seen: Sequence[Live]) -> bool:
        """Whether something of it is alive, or is again."""
        alive = [one for one in seen if not one.has_ended]
        if alive:
            self._end_waits(alive)
            return True
        now = ledger.current(self._sweep.paths)
        if now is None or now.on != "slurm" or ledger.is_cancelled(self._sweep.paths, now.token):
            return False
        workers = [one for one in seen if one.token == now.token and not one.what.startswith("reduce")]
        return self._needs_more(workers) and self._go_on(now, workers)

    def _needs_more(self, workers: Sequence[Live]) -> bool:
        self._sweep.refresh()
        return bool(self._sweep.fold.num_missing) or (
            self._retries and any(one.state != "COMPLETED" for one in workers)
        )

    def _end_waits(self, alive: Sequence[Live]) -> None:
        waiting = [one for one in alive if _waits(one)] if self._may_end_waits else []
        if not waiting:
            return
        ended = end_waits(waiting)
        if ended:
            self._say(f"{self._sweep.id}: requeued, and started without the wait: {', '.join(ended)}")
        elif any(map(_was_requeued, waiting)):
            self._may_end_waits = False

    def _go_on(self, now: Submission, workers: Sequence[Live]) -> bool:
        states = [one.state for one in workers]
        self._count_fruitless(states)
        why_not = objection(states, num_workers=now.num_workers, fruitless=self._fruitless)
        if why_not is not None:
            self._say(f"{self._sweep.id}: not submitted again: {why_not}; `orc resume {self._sweep.id}` goes on")
            return False
        self._write_down(now, workers)
        self._submit(states)
        return True

    def _count_fruitless(self, states: Sequence[str]) -> None:
        before, self._progress = self._progress, self._look_at_progress()
        if self._progress != before:
            self._fruitless = 0
        elif not _SLURMS_DOING.intersection(states):
            self._fruitless += 1

    def _look_at_progress(self) -> Progress:
        fold = self._sweep.fold
        return fold.num_missing, sum(fold.retries().values()), sum(map(len, fold.running().values()))

    def _submit(self, states: Sequence[str]) -> None:
        receipt = self._again()
        if receipt.submission is None or receipt.already:
            return  # somebody else was faster
        ended = ", ".join(f"{number} {state}" for state, number in sorted(Counter(states).items()))
        jobs = ", ".join(f"{part.what} {part.job}" for part in receipt.submission.parts)
        missing = f"{self._sweep.fold.num_missing:,} of {self._sweep.plan.num_trials:,} trials"
        self._say(f"{self._sweep.id}: its workers have ended ({ended}); {missing} go on in {jobs}")

    def _write_down(self, now: Submission, workers: Sequence[Live]) -> None:
        """Of the attempts that these workers were at, what Slurm says of their end: soon nobody will know."""
        states = {one.job: one.state for one in workers if one.state in _CAUSES}
        lines = list(ends(self._sweep, now.token, states))
        if not lines:
            return
        who = slurm_env.describe(submission=now.token, slots=0, packages=())
        writer = RecordWriter(self._sweep.paths, {name: who[name] for name in ("submission", "host", "pid", "boot")})
        try:
            writer.append(*lines, durable=True)
        finally:
            writer.close()
        self._sweep.refresh()
        self._progress = self._look_at_progress()


def ends(sweep: SweepState, token: str, states: Mapping[str, str]) -> Iterator[JsonObject]:
    """The ends of the attempts that some jobs of a submission left open, by the cause that Slurm names.

    Args:
        sweep: up to date.
        token: of the submission.
        states: job -> its last state.
    """
    found: dict[str, list[tuple[int, str, JsonObject]]] = {}
    for name, line in sweep.fold.writers().items():
        job = str(line.get("job"))
        if job in states and line.get("submission") == token:
            found.setdefault(job, []).append((as_index(line.get("restarts")), name, line))
    for job, writers in found.items():
        # The last run of the job; of earlier ones it is known that they were requeued.
        last = [(name, line) for restarts, name, line in writers if restarts == max(writers)[0]]
        slots = max(1, as_index(last[0][1].get("slots")))
        paths = [sweep.paths.record(name) for name, _ in last]
        for place, (trial, attempt) in enumerate(_open_attempts(paths)):
            detail, begun = f"Slurm says {states[job]}", place < slots
            yield records.end(trial=trial, attempt=attempt, cause=_CAUSES[states[job]], detail=detail, begun=begun)


def _open_attempts(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """(trial, attempt) of the starts that have neither outcome nor end in the same files, in the order of starting."""
    started: dict[tuple[int, int], None] = {}
    closed: set[tuple[int, int]] = set()
    for path in paths:
        for _, text in atomic.lines(path):
            line = atomic.unchecked(text) if text.startswith(_TELLING) else None
            if line is not None:
                attempt = as_index(line.get("trial")), as_index(line.get("attempt"))
                started |= {attempt: None} if line["kind"] == "start" else {}
                closed |= {attempt} if line["kind"] != "start" else set()
    return [attempt for attempt in started if attempt not in closed]
