"""The scheduler decides which trial runs next, and what the end of an attempt means for its trial.

    scheduler.fill(may_claim)                   claim a block when nothing is in hand
    assignment = scheduler.next()               a trial, or a pack, for a free slot; None if there is none
    attempt = scheduler.begin(slot, assignment)
    scheduler.finish(slot, outcome)             it has an outcome
    scheduler.end(slot, cause, detail)          it has none: the attempt is charged, and the trial tried again or failed

It has no sockets and no processes, and writes no file but the records, by the writer that it is given.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from orchestrator.config.plan import PlanFile
from orchestrator.config.spec import Retries
from orchestrator.core.atomic import JsonObject
from orchestrator.core.messages import Cause, Message, Outcome, Progress, Reported, Resumed, Status
from orchestrator.results import records
from orchestrator.results.top_models import TopModels
from orchestrator.supervisor.rank_verdict import RankVerdict
from orchestrator.supervisor.removals import Removals
from orchestrator.supervisor.trial_queue import Assignment, PendingTrial

__all__ = ["RunningAttempt", "TrialScheduler", "given_up", "spent"]


class Writer(Protocol):
    """Writes records; a `RecordWriter` is one."""

    def append(self, *lines: JsonObject, durable: bool = False, lasting: bool = True) -> None:
        """Append lines, on the disk when this returns if they are to be `durable`."""
        ...


class Queue(Protocol):
    """Where trials come from; a `TrialQueue` is one."""

    def next(self) -> list[PendingTrial]:
        """Return the trials of one more block; empty when there is nothing left to do."""
        ...

    def has_outcome(self, trial: int) -> bool:
        """Whether a trial, whoever ran it, is seen to have an outcome."""
        ...


@dataclass(slots=True)
class RunningAttempt:
    """An attempt at a trial, or at a pack, in a slot.

    Args:
        assignment: what runs.
        began: when, on the monotonic clock, in seconds.
        memory_kills: how often memory had run out before.
        has_saved: there may be checkpoints.
        ranks: what is known of its ranks, where it has several.
        unrecordable: why an outcome of it can't be recorded.
        malformed: why its worker is being ended: it sent what is no message.
    """

    assignment: Assignment
    began: float
    memory_kills: int = 0
    has_saved: bool = False
    ranks: RankVerdict | None = None
    unrecordable: str = ""
    malformed: str = ""

    def is_meant_by(self, index: int, attempt: int) -> bool:
        """Whether a message about this trial and attempt is about this one, and not late."""
        return (index, attempt) == (self.assignment.lead, self.assignment.attempt)

    def pending(self, trial: int | None) -> PendingTrial | None:
        """Return the trial of a message, the lead if it names none; None when that has an outcome already."""
        return self.assignment.open.get(self.assignment.lead if trial is None else trial)

    @property
    def seconds(self) -> float:
        """How long it has run, in seconds; of a pack each trial's part."""
        return (time.monotonic() - self.began) / len(self.assignment.pack)


class TrialScheduler:
    """Decides what runs, and what comes of it.

    Args:
        plan: the sweep's.
        queue: where trials come from.
        writer: of this supervisor's records.
        removals: told what is needed no more.
    """

    def __init__(self, plan: PlanFile, queue: Queue, writer: Writer, removals: Removals) -> None:
        self._plan = plan
        self._launch = plan.spec.launch
        self._is_command = plan.spec.command is not None
        self._queue = queue
        self._writer = writer
        self._removals = removals
        self._top_models = TopModels(plan.spec.metric, plan.spec.reduce.top)
        self._assignments: deque[Assignment] = deque()
        self._open: dict[int, PendingTrial] = {}
        self._has_abandoned = False
        self.running: dict[int, RunningAttempt] = {}
        self.is_exhausted = False

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run, here."""
        return self.is_exhausted and not self._assignments and not self.running

    @property
    def has_work_left(self) -> bool:
        """Whether something that was, or could be, in hand has no outcome."""
        return bool(self._has_abandoned or self._open or self._assignments or not self.is_exhausted)

    @property
    def bar(self) -> float | None:
        """The objective's value that a model must reach to rank; None while any does."""
        return self._top_models.bar

    # Handing out

    def fill(self, may_claim: Callable[[], bool]) -> None:
        """Claim blocks until there is something in hand, or nothing left, or `may_claim` says no."""
        while not (self._assignments or self.is_exhausted) and may_claim():
            self._take_in(self._queue.next())

    def next(self) -> Assignment | None:
        """Return what a free slot is to run next."""
        return self._assignments.popleft() if self._assignments else None

    def begin(self, slot: int, assignment: Assignment, *, memory_kills: int, ranks: RankVerdict | None) -> None:
        """Note that a slot runs something now."""
        has_saved = assignment.attempt > 0
        self.running[slot] = RunningAttempt(assignment, time.monotonic(), memory_kills, has_saved, ranks)
        if self._launch.pack > 1:
            self._start(assignment.open.values())

    def _take_in(self, block: list[PendingTrial]) -> None:
        self.is_exhausted = not block
        block = [pending for pending in block if not self._is_given_up(pending)]
        if self._launch.pack == 1:
            self._start(block)
        self._assignments.extend(self._packed(block))

    def _start(self, block: Iterable[PendingTrial]) -> None:
        # Durable before user code runs: a trial that takes the whole machine down is known by its start.
        block = list(block)
        lines = (records.start(trial=pending.trial, attempt=pending.attempt) for pending in block)
        self._writer.append(*lines, durable=True)
        self._open.update((pending.trial, pending) for pending in block)

    def _packed(self, block: list[PendingTrial]) -> list[Assignment]:
        by_pack: dict[tuple[int, ...], list[PendingTrial]] = {}
        for pending in block:
            by_pack.setdefault(self._plan.pack(pending.trial), []).append(pending)
        return [Assignment(pack, members) for pack, members in by_pack.items()]

    def _is_given_up(self, pending: PendingTrial) -> bool:
        """Fail a trial whose earlier attempts, with other workers too, have spent a budget already."""
        cause = spent(self._launch.retries, pending.charges)
        if cause is None:
            return False
        number = pending.charges[cause]
        error = given_up(cause, number, f"{number} attempts ended by: {cause.value}")
        self._record(pending, Status.FAILED, {"cause": cause.value, "error": error}, 0.0)
        if self._launch.pack == 1:  # else others of its pack may need what is in its folder
            self._removals.checkpoints.append(pending.trial)
        self._removals.reports += [pending] if self._is_command else []
        return True

    # What workers say

    def note(self, running: RunningAttempt, message: Message) -> None:
        """Record a report, or where an attempt is; the latter is for people, so nobody waits for the disk."""
        match message:
            case Reported(step=step, metrics=metrics, trial=trial):
                if (pending := running.pending(trial)) is not None:
                    self._writer.append(
                        records.report(trial=pending.trial, attempt=pending.attempt, step=step, metrics=metrics)
                    )
            case Progress(step=step, saved=saved, trial=trial):
                running.has_saved = running.has_saved or saved is not None
                index = running.assignment.lead if trial is None else trial
                line = records.at(trial=index, attempt=running.assignment.attempt, step=step, saved=saved)
                self._writer.append(line, lasting=False)
            case Resumed(step=step, trial=trial, together=together):
                index = running.assignment.lead if trial is None else trial
                trials = [index] if together is None else together
                lines = (
                    records.resume(trial=pending.trial, attempt=pending.attempt, step=step, lead=index)
                    for pending in running.assignment.open.values()
                    if pending.trial in trials
                )
                self._writer.append(*lines, lasting=False)

    def finish(self, slot: int, outcome: Outcome) -> None:
        """Record what a trial has come to, or one of a pack; the slot is free if that was all."""
        running = self.running[slot]
        running.has_saved = running.has_saved or outcome.saved
        pending = running.pending(outcome.trial)
        if pending is not None:
            self._finish(running, pending, outcome.status, outcome.payload)
        if outcome.trial is None:
            self.running.pop(slot)

    def finish_pack(self, slot: int) -> None:
        """End a pack: a trial of it that has no outcome came to one that can't be recorded, by its own fault."""
        running = self.running[slot]
        if running.assignment.open:
            self.end(slot, Cause.ERROR, running.unrecordable)
        else:
            self.running.pop(slot)

    def _finish(self, running: RunningAttempt, pending: PendingTrial, status: Status, payload: JsonObject) -> None:
        self._record(pending, status, payload, running.seconds)
        del running.assignment.open[pending.trial]
        self._open.pop(pending.trial, None)
        if self._is_command:
            self._removals.reports.append(pending)
        if not running.assignment.open and (self._is_command or running.has_saved or status is Status.FAILED):
            self._removals.checkpoints += running.assignment.pack
        value, model = payload.get("value"), payload.get("model")
        if isinstance(value, float) and isinstance(model, str):
            self._removals.models += self._top_models.add(pending.trial, value, model)

    def _record(self, pending: PendingTrial, status: Status, payload: JsonObject, seconds: float) -> None:
        self._writer.append(
            records.outcome(
                trial=pending.trial, attempt=pending.attempt, status=status, payload=payload, seconds=seconds
            )
        )

    # Ends without an outcome

    def drop(self, slot: int, reason: str) -> None:
        """Drop what somebody else is said to have finished: nothing is charged, unless that turns out untrue."""
        dropped = list(self.running.pop(slot).assignment.open.values())
        for pending in dropped:
            self._open.pop(pending.trial, None)
            self._end_unbegun(pending, reason)
        left = [pending for pending in dropped if not self._queue.has_outcome(pending.trial)]
        for pending in left:
            pending.charges[Cause.UNKNOWN] += 1  # so that a false "already finished" can't repeat without limit
        self._try_again(left)

    def end(self, slot: int, cause: Cause, detail: str, step: int | None = None, *, again: bool = True) -> None:
        """Charge an attempt that ended without an outcome, and fail those of its trials whose budget is spent.

        The others are tried `again` at once, or left for a later run of the job.
        """
        running = self.running.pop(slot)
        pending = list(running.assignment.open.values())
        left = [each for each in pending if not self._charge(running, each, cause, detail, step)]
        if again:
            self._try_again(left)
        else:
            self._has_abandoned = self._has_abandoned or bool(left)

    def close(self, cause: Cause) -> None:
        """Record the end of everything that is open, and why it ended."""
        begun = {trial for running in self.running.values() for trial in running.assignment.open}
        for pending in self._open.values():
            has_begun = pending.trial in begun
            detail = "stopped before it was done" if has_begun else "not begun"
            self._writer.append(
                records.end(trial=pending.trial, attempt=pending.attempt, cause=cause, detail=detail, begun=has_begun)
            )
        self._open.clear()

    def give_back(self, reason: str) -> None:
        """Record that everything open has ended through no fault of its own."""
        for pending in self._open.values():
            self._end_unbegun(pending, reason)

    def _end_unbegun(self, pending: PendingTrial, detail: str) -> None:
        self._writer.append(
            records.end(trial=pending.trial, attempt=pending.attempt, cause=Cause.UNKNOWN, detail=detail, begun=False)
        )

    def _try_again(self, block: Iterable[PendingTrial]) -> None:
        again = [PendingTrial(pending.trial, pending.attempt + 1, pending.charges) for pending in block]
        if again:
            self._take_in(again)

    def _charge(
        self, running: RunningAttempt, pending: PendingTrial, cause: Cause, detail: str, step: int | None
    ) -> bool:
        """Charge an attempt to its cause; return whether its trial has failed by that."""
        self._writer.append(
            records.end(trial=pending.trial, attempt=pending.attempt, cause=cause, detail=detail, step=step)
        )
        pending.charges[cause] += 1
        if spent(self._launch.retries, pending.charges) is cause:
            error = given_up(cause, pending.charges[cause], detail)
            self._finish(running, pending, Status.FAILED, {"cause": cause.value, "error": error})
            return True
        self._open.pop(pending.trial, None)
        return False


def budget(retries: Retries, cause: Cause) -> int | None:
    """Return how often an attempt may end by `cause`; None for causes that are never the trial's fault."""
    budgets = {
        Cause.ERROR: retries.error,
        Cause.SIGNAL: retries.signal,
        Cause.MEMORY: retries.memory,
        Cause.TIMEOUT: retries.timeout,
        Cause.UNKNOWN: retries.unknown,
    }
    return budgets.get(cause)


def spent(retries: Retries, charges: Counter[Cause]) -> Cause | None:
    """Return a cause by which more attempts have ended than its budget allows; None when there is none."""
    budgets = ((cause, budget(retries, cause)) for cause in charges)
    return next((cause for cause, most in budgets if most is not None and charges[cause] > most), None)


def given_up(cause: Cause, times: int, detail: str) -> str:
    """Return why a trial failed that was tried `times` times too often, and what helps where something does."""
    if cause is Cause.TIMEOUT:
        return (
            f"timed out {times} time{'s' if times > 1 else ''}; `orc resume --failed --set slurm.time=...` gives more"
        )
    if cause is Cause.MEMORY:
        return f"{detail}: out of memory; `orc resume --failed --set slurm.mem=...` gives more"
    return detail
