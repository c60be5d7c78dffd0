"""The supervisor's loop: it runs trials until none is left, or until it is asked to leave.

It takes signals, claims blocks of trials, hands one trial after the other to warm workers, and is the only one who
writes this process start's record file. A worker that dies costs the trial that it ran, never the trials after it: the
attempt is charged to its cause, and the trial is tried again or, with its budget spent, failed.

The loop here only connects its parts: the scheduler decides, the worker pool speaks with the workers, the notice
handler answers signals.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import sys
import time

from orchestrator.config.plan import PlanFile
from orchestrator.core import slurm_env
from orchestrator.core.messages import (
    AttemptEnded,
    AttemptMessage,
    Cause,
    FromWorker,
    Malformed,
    Message,
    Outcome,
    PackDone,
    RunTrial,
    Superseded,
    Unable,
    WorkerExited,
    WorkerId,
)
from orchestrator.core.signals import Signals
from orchestrator.errors import OrcError
from orchestrator.results import claims, records
from orchestrator.results.fold import Fold
from orchestrator.results.records import RecordWriter, Unrecordable
from orchestrator.slurm import ledger
from orchestrator.slurm.notice_policy import Action, Decision
from orchestrator.slurm.own_job import OwnJob
from orchestrator.supervisor.local_workers import memory_kills
from orchestrator.supervisor.notice_handler import NoticeHandler
from orchestrator.supervisor.options import Options, new_local_workers, num_ranks_here
from orchestrator.supervisor.rank_verdict import RankVerdict, death
from orchestrator.supervisor.remote_nodes import NodeLost, RemoteNodes
from orchestrator.supervisor.removals import Removals
from orchestrator.supervisor.scheduler import RunningAttempt, TrialScheduler
from orchestrator.supervisor.trial_queue import Assignment, GoneWriters, TrialQueue
from orchestrator.supervisor.worker_pool import WorkerPool

__all__ = ["Supervisor"]

_LEFT_EARLY = 75
_NODE_SILENT_S = 60.0
_KILLED = "killed by SIGKILL"


class Supervisor:
    """Runs trials until none is left that isn't someone else's, or until it is asked to leave.

    Raises:
        ProgramError: the program can't be imported on this machine.
        OrcError: records can't be written, or the plan can't be read.
    """

    def __init__(self, options: Options, signals: Signals) -> None:
        self._paths = options.paths
        self._options = options
        self._plan = PlanFile.open(options.paths.plan)
        self._spec = self._plan.spec
        self._ranks_here = num_ranks_here(options, self._plan)
        place = slurm_env.SlurmPlace.of(os.environ)
        self._writer = _open_writer(options, self._plan)
        self._queue = _open_queue(options, self._plan, place, self._writer)
        self._removals = Removals()
        self._scheduler = TrialScheduler(self._plan, self._queue, self._writer, self._removals)
        self._pool = WorkerPool(
            new_local_workers(options, self._plan),
            self._remote_nodes(),
            folder=options.folder,
            import_s=self._spec.launch.import_timeout_s,
        )
        self._notices = NoticeHandler(
            signals,
            OwnJob(place, options.submission, notice_s=float(self._spec.launch.notice_s)) if place else None,
            self._spec,
            self._writer,
            is_cancelled=self._is_cancelled,
            tell=self._pool.tell,
            reap=self._reap,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ, self._notices.on_signals)
        self._selector.register(self._pool, selectors.EVENT_READ, self._poll)
        self._signals = signals

    def _remote_nodes(self) -> RemoteNodes | None:
        num_nodes = self._options.seat.num_nodes
        if num_nodes == 1:
            return None
        silent_s = max(_NODE_SILENT_S, self._spec.launch.silent_s)
        return RemoteNodes(
            self._options.folder, num_nodes=num_nodes, ranks_per_node=self._ranks_here, silent_s=silent_s
        )

    def run(self) -> int:
        """Work; return the exit code: 0, or 75 when it left early."""
        _let_workers_run()
        try:
            self._pool.open_nodes()
            self._scheduler.fill(self._may_claim)
            if not self._is_done():
                self._pool.open()
            while not self._is_done():
                self._assign()
                self._wait()
            return self._leave()
        except OrcError as error:
            with contextlib.suppress(OrcError):  # as far as it can still be written
                self._scheduler.give_back(str(error))
                self._writer.sync()
            raise
        finally:
            self._pool.stop()
            self._writer.close()
            self._removals.carry_out(self._paths, self._writer)

    def is_sweep_done(self) -> bool:
        """Whether every trial, whoever ran it, is seen to have an outcome."""
        return self._queue.is_sweep_done()

    # The loop

    def _is_done(self) -> bool:
        if self._notices.decision is not None:
            return not self._scheduler.running or self._notices.last_call_left_s == 0
        return self._scheduler.is_done

    def _wait(self) -> None:
        if self._is_done():
            return
        events = self._selector.select(self._until_due_s())
        # Signals first: a worker that ends because of one must not be charged for it.
        for key, _ in sorted(events, key=lambda event: event[0].fileobj is not self._signals):
            key.data()

    def _until_due_s(self) -> float:
        due = min(self._writer.tick(), self._check_ranks(), self._check_nodes(), self._pool.import_left_s())
        self._removals.carry_out(self._paths, self._writer)
        last_call = self._notices.last_call_left_s
        return due if last_call is None else max(0.0, min(due, last_call))

    def _may_claim(self) -> bool:
        if self._notices.decision is None and self._is_cancelled():
            self._adopt(Decision(Cause.CANCELLED, Action.LEAVE))
        return self._notices.decision is None

    def _adopt(self, decision: Decision) -> None:
        self._notices.adopt(decision)

    def _is_cancelled(self) -> bool:
        return ledger.is_cancelled(self._paths, self._options.submission)

    # To workers

    def _assign(self) -> None:
        if not self._pool.is_ready:
            return
        for slot in range(self._options.slots):
            if slot in self._scheduler.running or not self._pool.is_free(slot):
                continue
            self._scheduler.fill(self._may_claim)
            assignment = self._scheduler.next() if self._notices.decision is None else None
            if assignment is not None:
                self._hand_over(slot, assignment)

    def _hand_over(self, slot: int, assignment: Assignment) -> None:
        num_ranks = self._spec.launch.num_ranks
        self._scheduler.begin(slot, assignment, memory_kills=memory_kills(), ranks=self._new_verdict(num_ranks))
        for rank in range(num_ranks):
            self._pool.send(WorkerId(slot, rank), self._run_trial(assignment, rank))

    def _run_trial(self, assignment: Assignment, rank: int) -> RunTrial:
        trial, is_pack = self._plan.trial(assignment.lead), self._spec.launch.pack > 1
        return RunTrial(
            index=trial.index,
            trial=trial.trial,
            params=trial.params,
            seed=trial.seed,
            attempt=assignment.attempt,
            bar=self._scheduler.bar,
            writer=self._writer.writer,
            rank=rank,
            local_rank=rank % self._ranks_here,
            local_size=self._ranks_here,
            host=self._pool.host,
            pack=[self._plan.trial(index).to_json() for index in assignment.pack] if is_pack else [],
            open=[*assignment.open] if is_pack else [],
        )

    def _new_verdict(self, num_ranks: int) -> RankVerdict | None:
        if num_ranks == 1:
            return None
        silent_s, are_workers = self._spec.launch.silent_s, self._spec.command is None
        return RankVerdict(num_ranks, silent_s=silent_s, clock=time.monotonic, in_agreement=are_workers)

    # From workers

    def _poll(self) -> None:
        try:
            for event in self._pool.poll():
                self._handle(event)
        except NodeLost as error:
            self._lose_node(error)

    def _reap(self) -> None:
        for event in self._pool.reap():
            self._handle(event)

    def _handle(self, event: FromWorker | WorkerExited) -> None:
        running = self._scheduler.running.get(event.slot)
        if running is None:
            return
        match event:
            case WorkerExited(status=status):
                self._on_exit(running, event.worker, status)
            case FromWorker(body=Malformed(error=error)):
                self._on_malformed(running, event.worker, error)
            case FromWorker(body=AttemptMessage(index=index, attempt=attempt, body=body)):
                if running.is_meant_by(index, attempt):
                    for message in [body] if running.ranks is None else running.ranks.hear(event.rank, body):
                        self._try_act(event.slot, running, message)

    def _on_malformed(self, running: RunningAttempt, worker: WorkerId, error: str) -> None:
        """End a worker that sends what is no message; its attempt is charged once it has ended."""
        detail = f"the worker sent what is no message: {error}"
        print(f"orchestrator: {detail}", file=sys.stderr)
        if running.ranks is None:
            running.malformed = running.malformed or detail
        else:
            for _ in running.ranks.hear(worker.rank, AttemptEnded(cause=Cause.ERROR, detail=detail)):
                pass
        self._pool.kill(worker)

    def _on_exit(self, running: RunningAttempt, worker: WorkerId, status: int) -> None:
        """Handle a worker's exit, after all its messages have been read."""
        if running.ranks is not None:
            running.ranks.exited(worker.rank, status)
            if running.ranks.verdict is not None:
                self._act(worker.slot, running, running.ranks.verdict)
        elif running.malformed:
            self._end(worker.slot, running, AttemptEnded(cause=Cause.ERROR, detail=running.malformed))
        else:
            self._end(worker.slot, running, death(status))

    def _try_act(self, slot: int, running: RunningAttempt, message: Message) -> None:
        """Act on a message; a trial whose outcome can't be recorded has none, and a report that can't is left out."""
        try:
            self._act(slot, running, message)
        except Unrecordable as error:
            print(f"orchestrator: {error}", file=sys.stderr)
            if isinstance(message, Outcome) and message.trial is not None:
                running.unrecordable = str(error)
            elif isinstance(message, Outcome):
                self._end(slot, running, AttemptEnded(cause=Cause.ERROR, detail=str(error)))

    def _act(self, slot: int, running: RunningAttempt, message: Message) -> None:
        match message:
            case Outcome():
                self._scheduler.finish(slot, message)
            case PackDone():
                self._scheduler.finish_pack(slot)
            case Unable(reason=reason):
                raise OrcError(f"trial {running.assignment.lead} can't go on here: {reason}")
            case Superseded(reason=reason):
                self._scheduler.drop(slot, reason)
            case AttemptEnded():
                self._end(slot, running, message)
            case _:
                self._scheduler.note(running, message)

    def _end(self, slot: int, running: RunningAttempt, ended: AttemptEnded) -> None:
        detail = records.brief(ended.detail)
        cause = self._notices.explain(ended.cause, detail)
        if cause is Cause.SIGNAL and detail.endswith(_KILLED) and memory_kills() > running.memory_kills:
            cause = Cause.MEMORY
        self._scheduler.end(slot, cause, detail, ended.step, again=self._notices.decision is None)

    # What nobody says

    def _check_ranks(self) -> float:
        """End ranks that hang; return in how many seconds to check again."""
        running = [(slot, each.ranks) for slot, each in self._scheduler.running.items() if each.ranks is not None]
        for slot, ranks in running:
            for rank in ranks.check() if ranks.due_s <= 0 else ():
                self._pool.kill(WorkerId(slot, rank))
        return min((ranks.due_s for _, ranks in running), default=math.inf)

    def _check_nodes(self) -> float:
        try:
            return self._pool.check_nodes()
        except NodeLost as error:
            self._lose_node(error)
            return 0.0

    def _lose_node(self, error: NodeLost) -> None:
        """Ask to be started anew, since the job can't go on without all its nodes.

        What ran may be why the node is gone, so it is charged as whatever ends with its machine is.
        """
        print(f"orchestrator: {error}", file=sys.stderr)
        for slot in list(self._scheduler.running):
            self._scheduler.end(slot, Cause.UNKNOWN, str(error), again=False)
        self._notices.lose_node()

    # Leaving

    def _leave(self) -> int:
        decision = self._notices.decision
        if decision is None:
            return 0
        has_work_left = self._scheduler.has_work_left
        self._scheduler.close(decision.cause)
        self._writer.sync()
        self._pool.stop()
        if has_work_left:
            self._notices.request_requeue()
        return _LEFT_EARLY if has_work_left else 0


def _open_writer(options: Options, plan: PlanFile) -> RecordWriter:
    packages = ("slurm-orchestrator",) if plan.spec.command is not None else ("slurm-orchestrator", "torch", "numpy")
    slots = options.slots * plan.spec.launch.pack
    who = slurm_env.describe(submission=options.submission, slots=slots, packages=packages)
    return RecordWriter(options.paths, who, beat_s=plan.spec.launch.lease_s / 4)


def _open_queue(
    options: Options, plan: PlanFile, place: slurm_env.SlurmPlace | None, writer: RecordWriter
) -> TrialQueue:
    submission = ledger.find(options.paths, options.submission)
    return TrialQueue(
        claims.Block.all(plan.num_trials, plan.blocks.size),
        options.worker,
        claims=claims.Claims(options.paths, writer.writer),
        fold=Fold(options.paths, plan.num_trials),
        growth=claims.WriterWatch(options.paths, plan.spec.launch.lease_s),
        succession=GoneWriters(
            submission=options.submission,
            job=place.job if place else None,
            restarts=place.restarts if place else 0,
            superseded=frozenset(submission.supersedes if submission else ()),
            retry_failed=submission is not None and submission.retry_failed,
        ),
    )


def _let_workers_run() -> None:
    """Have this process wait for its turn when a worker says something, instead of interrupting the workers each time.

    They fill the processors, so that is where a fifth of a millisecond a report would come from. A worker that waits
    for its next trial has left its processor to us.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
