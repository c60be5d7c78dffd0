"""The supervisor: what Slurm, or this machine, starts. It never imports torch.

    python -P -m orchestrator.supervisor work --dir SWEEP --submission TOKEN [--worker K] [--slots N] [--then-reduce]

It takes notices, claims blocks of trials, hands one trial after the other to warm workers, and is the only one who
writes this process start's record file. A worker that dies costs the trial that it ran, never the trials after it: the
attempt is charged to its cause, and the trial is tried again or, with its budget spent, failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import select
import selectors
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.plan import PlanFile
from orchestrator.core import scratch, slurm_env
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process_tree import MARK, adopt_orphans, mark
from orchestrator.core.signals import Signals
from orchestrator.core.slurm_env import ALONE, LOOPBACK, Seat
from orchestrator.errors import OrcError, ProgramError, UsageError
from orchestrator.results import claims, records, resumption, top_models
from orchestrator.results.fold import Fold
from orchestrator.results.records import Cause, RecordWriter, Status, Unrecordable
from orchestrator.slurm import ledger
from orchestrator.slurm.notice_policy import Action, Decision, Situation
from orchestrator.slurm.own_job import OwnJob, acknowledge, touch
from orchestrator.supervisor import retries as budgets
from orchestrator.supervisor.devices import devices, devices_of_trial
from orchestrator.supervisor.node_agent import Outpost
from orchestrator.supervisor.rank_verdict import Crew, death
from orchestrator.supervisor.remote_nodes import FarWorker, Heard, NodeLost, Outposts, addresses, call
from orchestrator.supervisor.trial_queue import Ready, Source, Succession, Work
from orchestrator.supervisor.worker_pool import Children, Exited, Post, Worker, memory_kills
from orchestrator.worker import command_reports

__all__ = ["Options", "Supervisor", "main"]

_LAST_CALL_S = 20.0
"""Before a time limit, in seconds: what still runs then is stopped, so that the requeue is ours and not too late."""
_SAVE_S = 3.0
"""After a cancel, in seconds: how long a trial may take to save. Slurm kills after KillWait, by default 30."""
_LEFT_EARLY = 75
_LATE_S = 1.0
"""How much later than its children's our own copy of a notice may come, in seconds."""
_TRIES = 3
"""How often a requeue is asked for at least, after pauses of one second, two, four, ... up to this many seconds:"""
_LONGEST_PAUSE_S = 8.0
_FAR_S = 180.0
"""How long the other nodes of a job may take to come, in seconds: shared file systems show files after a minute."""
_NODE_SILENT_S = 60.0
_KILLED = "killed by SIGKILL"
_ENDS_OF_A_NOTICE = ("SIGTERM", "SIGUSR1", "SIGINT", "to go on later")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a supervisor runs.

    Args:
        paths: the sweep.
        submission: token of the submission that started it.
        worker: its number; it begins with the block of that number.
        slots: trials at the same time.
        seat: of this process in its job step; on every node of a job of several there is one.
    """

    paths: SweepPaths
    submission: str
    worker: int = 0
    slots: int = 1
    seat: Seat = ALONE

    @property
    def folder(self) -> Path:
        """Where processes on several nodes meet."""
        return self.paths.rendezvous(f"{self.submission[:8]}-{self.worker}-{self.seat.name}")


@dataclass(slots=True)
class Running:
    """A trial, or a pack, at work in a slot, since `began` on the monotonic clock.

    It `has_saved` if there may be checkpoints, and has a `crew` if several ranks train it. Of what it has come to,
    `unrecordable` is what can't be written down.
    """

    work: Work
    began: float
    memory_kills: int
    has_saved: bool = False
    crew: Crew | None = None
    unrecordable: str = ""

    def is_meant_by(self, message: JsonObject) -> bool:
        """Whether a worker's message is of this attempt, and not a late word of one before."""
        return (message.get("index"), message.get("attempt")) == (self.work.lead, self.work.attempt)

    @property
    def seconds(self) -> float:
        """How long it has run, in seconds; of a pack each trial's part."""
        return (time.monotonic() - self.began) / len(self.work.pack)


class Supervisor:
    """Runs trials until none is left that isn't someone else's, or until it is asked to leave.

    Raises:
        ProgramError: the program can't be imported on this machine.
        OrcError: records can't be written, or the plan can't be read.
    """

    def __init__(self, options: Options, signals: Signals) -> None:
        self._paths = options.paths
        self._options = options
        self._signals = signals
        self._place = slurm_env.SlurmPlace.of(os.environ)
        self._plan = PlanFile.open(options.paths.plan)
        self._spec = self._plan.spec
        self._num_ranks = self._spec.launch.num_ranks
        self._ranks_here = _ranks_here(options, self._plan)
        self._children = _new_children(options, self._plan)
        self._outposts = self._new_outposts()
        self._import_by = 0.0
        self._writer = self._open_writer()
        self._source = self._open_source()
        self._podium = top_models.Podium(self._spec.metric, self._spec.reduce.top)
        self._queue: deque[Work] = deque()
        self._open: dict[int, Ready] = {}
        self._running: dict[int, Running] = {}
        self._let_go: list[tuple[int, str]] = []
        self._done: list[int] = []
        self._reported: list[Ready] = []
        self._exhausted = False
        self._abandoned = False
        self._job = self._own_job()
        self._decision: Decision | None = None
        self._noticed = 0.0
        self._is_told = False
        self._last_call: float | None = None
        self._selector = selectors.DefaultSelector()

    def _new_outposts(self) -> Outposts | None:
        seat = self._options.seat
        if seat.num_nodes == 1:
            return None
        return Outposts(
            self._options.folder,
            num_nodes=seat.num_nodes,
            ranks_per_node=self._ranks_here,
            silent_s=max(_NODE_SILENT_S, self._spec.launch.silent_s),
        )

    def _open_writer(self) -> RecordWriter:
        packages = (
            ("slurm-orchestrator",) if self._spec.command is not None else ("slurm-orchestrator", "torch", "numpy")
        )
        slots = self._options.slots * self._spec.launch.pack
        who = slurm_env.describe(submission=self._options.submission, slots=slots, packages=packages)
        return RecordWriter(self._paths, who, beat_s=self._spec.launch.lease_s / 4)

    def _own_job(self) -> OwnJob | None:
        notice_s = float(self._spec.launch.notice_s)
        return OwnJob(self._place, self._options.submission, notice_s=notice_s) if self._place else None

    def _open_source(self) -> Source:
        size = self._plan.blocks.size
        submission = ledger.find(self._paths, self._options.submission)
        return Source(
            claims.Block.all(self._plan.num_trials, size),
            self._options.worker,
            claims=claims.Claims(self._paths, self._writer.writer),
            fold=Fold(self._paths, self._plan.num_trials),
            growth=claims.Growth(self._paths, self._spec.launch.lease_s),
            succession=Succession(
                submission=self._options.submission,
                job=self._place.job if self._place else None,
                restarts=self._place.restarts if self._place else 0,
                superseded=frozenset(submission.supersedes if submission else ()),
                retry_failed=submission is not None and submission.retry_failed,
            ),
        )

    # The loop

    def run(self) -> int:
        """Work; returns the exit code: 0, or 75 when it left early."""
        _let_workers_run()
        try:
            self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
            self._open_outposts()
            self._fetch()
            if not self._is_done():
                self._open_children()
            while not self._is_done():
                self._assign()
                self._wait()
            return self._leave()
        except OrcError as error:
            self._take_back(str(error))
            raise
        finally:
            self._stop_workers()
            self._writer.close()
            self._let_go_of_files()

    def _open_outposts(self) -> None:
        """Let the other nodes come, even if there turns out to be nothing to do for them."""
        if self._outposts is None:
            return
        folder = self._options.folder
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier job with our number
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise OrcError(f"{folder}: the nodes of this job can't meet there: {error.strerror}") from error
        self._outposts.open(addresses(os.environ))
        self._selector.register(self._outposts, selectors.EVENT_READ, self._on_outposts)

    def _stop_workers(self) -> None:
        try:
            if self._outposts is not None:
                self._outposts.stop()
        finally:
            self._children.stop()

    def _open_children(self) -> None:
        """Import the program: seconds that a worker who found nothing to do never spends."""
        self._children.open()
        self._import_by = time.monotonic() + self._spec.launch.import_timeout_s
        self._selector.register(self._children.channel, selectors.EVENT_READ, self._on_children)

    def is_sweep_done(self) -> bool:
        """Whether every trial, whoever ran it, is seen to have an outcome."""
        return self._source.is_sweep_done()

    def _is_done(self) -> bool:
        if self._decision is not None:
            return not self._running or self._is_last_call()
        return self._exhausted and not self._queue and not self._running

    def _is_last_call(self) -> bool:
        return self._last_call is not None and time.monotonic() >= self._last_call

    def _wait(self) -> None:
        if self._is_done():
            return
        events = self._selector.select(self._until_due())
        # Notices first: a child that ends because of one must not be charged for it.
        for key, _ in sorted(events, key=lambda event: event[0].fileobj is not self._signals):
            key.data()

    def _until_due(self) -> float:
        due = min(self._writer.tick(), self._look_at_ranks(), self._look_at_nodes())
        self._let_go_of_files()
        if not self._is_ready:
            due = min(due, self._import_left())
        return due if self._last_call is None else max(0.0, min(due, self._last_call - time.monotonic()))

    @property
    def _is_ready(self) -> bool:
        """Whether workers can be started, on all nodes."""
        return self._children.ready and (self._outposts is None or self._outposts.ready)

    def _import_left(self) -> float:
        left = self._import_by - time.monotonic()
        if self._outposts is not None and self._children.ready:
            left += _FAR_S
            if left <= 0:
                raise OrcError(self._outposts.missing())
        if left <= 0:
            limit = self._spec.launch.import_timeout_s
            raise ProgramError(
                f"the program can't be imported on this machine in {limit:.0f} s; see launch.import_timeout_s"
            )
        return left

    # Handing out trials

    def _assign(self) -> None:
        if not self._is_ready:
            return
        for slot in range(self._options.slots):
            work = self._next() if slot not in self._running else None
            if work is not None:
                self._hand_over(slot, work)

    def _next(self) -> Work | None:
        self._fetch()
        return self._queue.popleft() if self._queue and self._decision is None else None

    def _fetch(self) -> None:
        """Claim a block when there is nothing in hand."""
        while not (self._queue or self._exhausted or self._decision):
            if self._is_cancelled():
                self._adopt(Decision(Cause.CANCELLED, Action.LEAVE), None)
                return
            self._begin(self._source.next())

    def _begin(self, block: list[Ready]) -> None:
        self._exhausted = not block
        block = [ready for ready in block if not self._is_given_up(ready)]
        if self._spec.launch.pack == 1:
            self._start(block)
        self._queue.extend(self._packed(block))

    def _start(self, block: Iterable[Ready]) -> None:
        # Durable before user code runs: a trial that takes the whole machine down is known by its start.
        block = list(block)
        self._writer.append(*(records.start(trial=r.trial, attempt=r.attempt) for r in block), durable=True)
        self._open.update((ready.trial, ready) for ready in block)

    def _packed(self, block: list[Ready]) -> list[Work]:
        """The packs that trials of a block are of."""
        found: dict[tuple[int, ...], list[Ready]] = {}
        for ready in block:
            found.setdefault(self._plan.pack(ready.trial), []).append(ready)
        return [Work(pack, ready) for pack, ready in found.items()]

    def _is_given_up(self, ready: Ready) -> bool:
        """Fail a trial whose earlier attempts, with other workers too, have spent a budget already."""
        cause = budgets.spent(self._spec.launch.retries, ready.charges)
        if cause is None:
            return False
        error = budgets.given_up(
            cause, ready.charges[cause], f"{ready.charges[cause]} attempts ended by: {cause.value}"
        )
        self._record(ready, Status.FAILED, {"cause": cause.value, "error": error}, 0.0)
        if self._spec.launch.pack == 1:  # else others of its pack may need what is in its folder
            self._done.append(ready.trial)
        self._reported += [ready] if self._spec.command is not None else []
        return True

    def _hand_over(self, slot: int, work: Work) -> None:
        trial = self._plan.trial(work.lead)
        self._running[slot] = Running(
            work, time.monotonic(), memory_kills(), has_saved=work.attempt > 0, crew=self._new_crew()
        )
        message: JsonObject = {
            "index": trial.index,
            "trial": trial.trial,
            "params": trial.params,
            "seed": trial.seed,
            "attempt": work.attempt,
            "bar": self._podium.bar,
            "writer": self._writer.writer,
        }
        if self._spec.launch.pack > 1:
            self._start(work.open.values())
            message["pack"] = [self._plan.trial(index).to_json() for index in work.pack]
            message["open"] = [*work.open]
        for rank in range(self._num_ranks):
            self._manned(Post(slot, rank)).channel.send({**message, **self._place_of(rank)})

    def _place_of(self, rank: int) -> JsonObject:
        """Which of its trial's ranks a worker is, and where rank 0 is met."""
        here = self._ranks_here
        host = LOOPBACK if self._outposts is None else self._outposts.host
        return {"rank": rank, "local_rank": rank % here, "local_size": here, "host": host}

    def _new_crew(self) -> Crew | None:
        if self._num_ranks == 1:
            return None
        silent_s, are_workers = self._spec.launch.silent_s, self._spec.command is None
        return Crew(self._num_ranks, silent_s=silent_s, clock=time.monotonic, in_agreement=are_workers)

    def _manned(self, post: Post) -> Worker | FarWorker:
        """The worker of a post, which may have to be started."""
        if self._outposts is not None and self._outposts.has(post):
            return self._outposts.worker(post)
        worker = self._children.workers.get(post)
        if worker is None:
            worker = self._children.start(post)
            self._selector.register(worker.channel, selectors.EVENT_READ, self._reader(post, worker.channel))
        return worker

    def _reader(self, post: Post, channel: Channel) -> Callable[[], None]:
        return lambda: self._on_worker(post, channel)

    def _on_outposts(self) -> None:
        assert self._outposts is not None
        try:
            for event in self._outposts.poll():
                if isinstance(event, Heard):
                    self._take(event.post, event.message)
                else:
                    self._note_exit(event)
        except NodeLost as error:
            self._lose_node(error)

    def _look_at_nodes(self) -> float:
        """Whether all nodes give signs of life; returns in how many seconds to look again."""
        if self._outposts is None:
            return math.inf
        try:
            return self._outposts.look()
        except NodeLost as error:
            self._lose_node(error)
            return 0.0

    def _lose_node(self, error: NodeLost) -> None:
        """Without all its nodes this job can't go on, so it asks to be started anew.

        What ran may be why the node is gone, so it is charged as whatever ends with its machine is.
        """
        print(f"orchestrator: {error}", file=sys.stderr)
        for slot in list(self._running):
            running = self._running.pop(slot)
            for ready in list(running.work.open.values()):
                if not self._charge(running, ready, Cause.UNKNOWN, str(error), None):
                    self._abandoned = True
        self._decision, self._is_told = Decision(Cause.NODE_FAILURE, Action.REQUEUE), True
        self._noticed = time.monotonic()

    # What children say

    def _on_worker(self, post: Post, channel: Channel) -> None:
        if channel.closed:
            return  # read to its end by an event that came at the same time
        for message in channel.receive():
            self._take(post, message)
        if channel.closed:
            self._selector.unregister(channel)

    def _take(self, post: Post, message: JsonObject) -> None:
        running = self._running.get(post.slot)
        if running is None or not running.is_meant_by(message):
            return
        for said in [message] if running.crew is None else running.crew.hear(post.rank, message):
            try:
                self._do(post.slot, running, said)
            except Unrecordable as error:
                self._refuse(post.slot, said, error)

    def _refuse(self, slot: int, message: JsonObject, error: Unrecordable) -> None:
        """A trial whose outcome can't be recorded has none, by its own fault; a report is left out."""
        print(f"orchestrator: {error}", file=sys.stderr)
        if "outcome" in message and "trial" in message:
            self._running[slot].unrecordable = str(error)
        elif "outcome" in message:
            self._end(slot, Cause.ERROR, str(error))

    def _do(self, slot: int, running: Running, message: JsonObject) -> None:
        """What the message of a trial, or of one of a pack, asks for."""
        ready = running.work.open.get(int(str(message.get("trial", running.work.lead))))
        if "report" in message:
            self._report(ready, _object(message["report"]))
        elif "at" in message or "resumed" in message:
            self._note_place(running, message)
        elif "outcome" in message:
            running.has_saved = running.has_saved or bool(message.get("saved"))
            if ready is not None:
                self._finish(running, ready, Status(str(message["outcome"])), _object(message["payload"]))
            if "trial" not in message:
                self._running.pop(slot)
        elif "over" in message:
            self._leave_pack(slot)
        elif "broken" in message:
            raise OrcError(f"trial {running.work.lead} can't go on here: {message['broken']}")
        elif "gone" in message:
            self._drop(slot, str(message["gone"]))
        elif "end" in message:
            step = message.get("step")
            self._end(slot, Cause(str(message["end"])), str(message["detail"]), step if isinstance(step, int) else None)

    def _report(self, ready: Ready | None, report: JsonObject) -> None:
        if ready is not None:
            self._writer.append({"kind": "report", "trial": ready.trial, "attempt": ready.attempt, **report})

    def _leave_pack(self, slot: int) -> None:
        """All of a pack is over: whoever has no outcome came to one that can't be recorded, by its own fault."""
        if self._running[slot].work.open:
            self._end(slot, Cause.ERROR, self._running[slot].unrecordable)
        else:
            self._running.pop(slot)

    def _note_place(self, running: Running, message: JsonObject) -> None:
        """Where trials are, or where they go on: for people, so nobody waits for the disk."""
        trial = int(str(message.get("trial", running.work.lead)))
        if "resumed" in message:
            step = int(str(message["resumed"]))
            lost = max(0, resumption.reached(self._paths, trial) - step)
            together = message.get("together", [trial])
            going_on = [
                one for one in running.work.open.values() if isinstance(together, list) and one.trial in together
            ]
            lines = [records.resume(trial=one.trial, attempt=one.attempt, step=step, lost=lost) for one in going_on]
        else:
            place = _object(message["at"])
            running.has_saved = running.has_saved or place["saved"] is not None
            lines = [{"kind": "at", "trial": trial, "attempt": running.work.attempt, **place}]
        self._writer.append(*lines, lasting=False)

    def _drop(self, slot: int, detail: str) -> None:
        """Somebody else has finished what was done here, so nothing is to be done or charged; unless that isn't so."""
        dropped = list(self._running.pop(slot).work.open.values())
        for ready in dropped:
            self._open.pop(ready.trial, None)
            self._writer.append(
                records.end(trial=ready.trial, attempt=ready.attempt, cause=Cause.UNKNOWN, detail=detail, begun=False)
            )
        left = [ready for ready in dropped if not self._source.has_outcome(ready.trial)]
        for ready in left:
            ready.charges[Cause.UNKNOWN] += 1  # so that what is not so is not said for ever
        self._try_again(left)

    def _try_again(self, block: Iterable[Ready]) -> None:
        if again := [Ready(ready.trial, ready.attempt + 1, ready.charges) for ready in block]:
            self._begin(again)

    def _finish(self, running: Running, ready: Ready, status: Status, payload: JsonObject) -> None:
        self._record(ready, status, payload, running.seconds)
        del running.work.open[ready.trial]
        self._open.pop(ready.trial, None)
        if self._spec.command is not None:
            self._reported.append(ready)
        if not running.work.open and (self._spec.command is not None or running.has_saved or status is Status.FAILED):
            self._done += running.work.pack
        value, model = payload.get("value"), payload.get("model")
        if isinstance(value, float) and isinstance(model, str):
            self._let_go += self._podium.add(ready.trial, value, model)

    def _record(self, ready: Ready, status: Status, payload: JsonObject, seconds: float) -> None:
        self._writer.append(
            records.outcome(trial=ready.trial, attempt=ready.attempt, status=status, payload=payload, seconds=seconds)
        )

    def _let_go_of_files(self) -> None:
        """Delete models that are beaten and checkpoints of trials that are done, once the outcomes are on the disk."""
        if not (self._let_go or self._done) or self._writer.is_dirty:
            return
        top_models.remove(self._paths, self._let_go)
        for trial in self._done:
            shutil.rmtree(self._paths.checkpoint(trial), ignore_errors=True)
        for ready in self._reported:
            command_reports.forget(self._paths, ready.trial, ready.attempt)
        self._let_go, self._done, self._reported = [], [], []

    def _end(self, slot: int, cause: Cause, detail: str, step: int | None = None) -> None:
        """An attempt ended without an outcome: charge it, and try again or give the trial up."""
        detail = records.brief(detail)
        if self._decision is None and detail.endswith(_ENDS_OF_A_NOTICE):
            self._listen(_LATE_S)
        if self._decision is not None and cause in self._ends_by_notice:
            cause = self._decision.cause
        elif cause is Cause.PREEMPTED:
            cause = Cause.UNKNOWN  # nobody asked it to go on later, and it must not do so for ever
        elif cause is Cause.SIGNAL and detail.endswith(_KILLED) and memory_kills() > self._running[slot].memory_kills:
            cause = Cause.MEMORY
        running = self._running.pop(slot)
        left = [
            ready for ready in list(running.work.open.values()) if not self._charge(running, ready, cause, detail, step)
        ]
        if self._decision is None:
            self._try_again(left)
        else:
            self._abandoned = self._abandoned or bool(left)

    def _charge(self, running: Running, ready: Ready, cause: Cause, detail: str, step: int | None) -> bool:
        """Whether a trial has failed now that an attempt at it has ended."""
        self._writer.append(
            records.end(trial=ready.trial, attempt=ready.attempt, cause=cause, detail=detail, step=step)
        )
        ready.charges[cause] += 1
        if budgets.spent(self._spec.launch.retries, ready.charges) is cause:
            error = budgets.given_up(cause, ready.charges[cause], detail)
            self._finish(running, ready, Status.FAILED, {"cause": cause.value, "error": error})
            return True
        self._open.pop(ready.trial, None)
        return False

    @property
    def _ends_by_notice(self) -> tuple[Cause, ...]:
        """How an attempt may end because it was told of a notice; programs answer TERM with any exit code."""
        by_signal = (Cause.SIGNAL, Cause.PREEMPTED)
        return by_signal if self._spec.command is None else (*by_signal, Cause.ERROR)

    def _on_children(self) -> None:
        for exited in self._children.poll():
            self._on_exit(exited)
        if self._children.channel.closed:
            self._selector.unregister(self._children.channel)

    def _on_exit(self, exited: Exited) -> None:
        channel = self._children.workers[exited.post].channel
        if not channel.closed:
            for message in channel.receive_rest():
                self._take(exited.post, message)
            self._selector.unregister(channel)
        self._children.forget(exited.post)
        self._note_exit(exited)

    def _note_exit(self, exited: Exited) -> None:
        """What the end of a worker, of which all words were heard, means for its trial."""
        running = self._running.get(exited.post.slot)
        if running is None:
            return
        if running.crew is None:
            self._do(exited.post.slot, running, death(exited.status))
            return
        running.crew.left(exited.post.rank, exited.status)
        if running.crew.verdict is not None:
            self._do(exited.post.slot, running, running.crew.verdict)

    def _look_at_ranks(self) -> float:
        """End those that hang; returns in how many seconds to look again."""
        crews = [(slot, running.crew) for slot, running in self._running.items() if running.crew is not None]
        for slot, crew in crews:
            for rank in crew.look() if crew.due_s <= 0 else ():
                self._kill(Post(slot, rank))
        return min((crew.due_s for _, crew in crews), default=math.inf)

    def _kill(self, post: Post) -> None:
        if self._outposts is not None and self._outposts.has(post):
            self._outposts.kill(post)
        else:
            self._children.kill(post)

    def _listen(self, seconds: float) -> None:
        """Take signals alone, for so long or until one changes the decision."""
        before, until = self._decision, time.monotonic() + seconds
        while self._decision is before and (left := until - time.monotonic()) > 0:
            if select.select([self._signals], [], [], left)[0]:
                self._on_signals()

    # Notices

    def _on_signals(self) -> None:
        names = self._signals.take()
        for exited in list(self._children.reap()):
            self._on_exit(exited)
        if names:
            self._on_notice(names)

    def _on_notice(self, names: list[str]) -> None:
        acknowledge()
        is_first = self._spec.program is not None and self._decision is None
        if is_first:
            self._tell("save")  # which is right whatever the reason is, and to ask for that may take a while
        situation, decision = self._judge()
        self._note("+".join(names), situation, f"{decision.cause}: {decision.action}")
        if decision.replaces(self._decision):
            self._adopt(decision, situation)
        if is_first and not self._is_told:
            self._tell("stay")

    def _note(self, name: str, situation: Situation | None, action: str) -> None:
        self._writer.append(records.notice(signal=name, state=str(situation), action=action), durable=True)

    def _adopt(self, decision: Decision, situation: Situation | None) -> None:
        is_first = self._decision is None
        self._decision = decision
        if decision.cause is Cause.CANCELLED:
            self._last_call = time.monotonic() + _SAVE_S
        elif decision.cause is Cause.TIMEOUT and situation is not None and situation.left_s is not None:
            self._last_call = time.monotonic() + max(0.0, situation.left_s - _LAST_CALL_S)
        if is_first:
            self._noticed = time.monotonic()
        # A program saves and stays while the reason is unknown; a command's TERM says both.
        if not self._is_told and (self._spec.command is not None or decision.action in (Action.REQUEUE, Action.LEAVE)):
            self._is_told = True
            self._tell("leave")

    def _tell(self, word: str) -> None:
        for worker in self._children.workers.values():
            worker.tell(word)
        for far in self._outposts.workers if self._outposts is not None else ():
            far.tell(word)

    def _judge(self) -> tuple[Situation | None, Decision]:
        if self._job is None or self._is_cancelled():
            return None, Decision(Cause.CANCELLED, Action.LEAVE)
        return self._job.judge()

    def _is_cancelled(self) -> bool:
        return ledger.is_cancelled(self._paths, self._options.submission)

    # Leaving

    def _leave(self) -> int:
        if self._decision is None:
            return 0
        left = bool(self._abandoned or self._open or self._queue or not self._exhausted)
        begun = {trial for running in self._running.values() for trial in running.work.open}
        for ready in self._open.values():
            self._writer.append(_stopped(ready, self._decision.cause, begun=ready.trial in begun))
        self._open.clear()
        self._writer.sync()
        self._stop_workers()
        if left:
            self._see_to_requeue()
        return _LEFT_EARLY if left else 0

    def _see_to_requeue(self) -> None:
        """Ask for our requeue until Slurm says that it comes, or that there must be none; or stay until it kills us."""
        until = self._noticed + self._spec.launch.notice_s
        for number in itertools.count():
            if self._action is Action.LEAVE:
                return
            situation, found = self._judge()
            if found.replaces(self._decision):
                self._decision = found
            if found.action is Action.LEAVE or (found.action, self._action) == (Action.GO_ON, Action.FINISH):
                return
            if found.action is not Action.FINISH and self._job is not None:
                self._job.requeue()
            if number + 1 >= _TRIES and time.monotonic() >= until:
                self._note("none", situation, f"{found.cause}: leaves without a requeue that Slurm confirms")
                return
            self._listen(min(2.0**number, _LONGEST_PAUSE_S))

    @property
    def _action(self) -> Action:
        return self._decision.action if self._decision is not None else Action.GO_ON

    def _take_back(self, error: str) -> None:
        """What is open ends here through no fault of its own; said as far as that can still be written."""
        with contextlib.suppress(OrcError):
            self._writer.append(
                *(
                    records.end(trial=r.trial, attempt=r.attempt, cause=Cause.UNKNOWN, detail=error, begun=False)
                    for r in self._open.values()
                ),
                durable=True,
            )


def _stopped(ready: Ready, cause: Cause, *, begun: bool) -> JsonObject:
    detail = "stopped before it was done" if begun else "not begun"
    return records.end(trial=ready.trial, attempt=ready.attempt, cause=cause, detail=detail, begun=begun)


def _let_workers_run() -> None:
    """Have this process wait for its turn when a worker says something, instead of interrupting the workers each time.

    They fill the processors, so that is where a fifth of a millisecond a report would come from. A worker that waits
    for its next trial has left its processor to us.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _object(value: object) -> JsonObject:
    assert isinstance(value, dict)
    return value


def _ranks_here(options: Options, plan: PlanFile) -> int:
    """Ranks of a trial on each machine: where there is but one, all of them."""
    launch = plan.spec.launch
    return launch.num_ranks if options.seat.num_nodes == 1 else launch.ranks_per_node


def _new_children(options: Options, plan: PlanFile) -> Children:
    """Workers of this machine."""
    launch, here = plan.spec.launch, _ranks_here(options, plan)
    return Children(
        options.paths,
        _environment(plan, options.submission),
        lambda post: _log_of(options, post),
        has_ranks=launch.num_ranks > 1,
        folder=options.folder if options.seat.num_nodes > 1 else None,
        devices_of=lambda post: _devices_of(plan, post, here),
    )


def _devices_of(plan: PlanFile, post: Post, here: int) -> str | None:
    launch = plan.spec.launch
    if plan.spec.command is not None:
        return devices_of_trial(launch, os.environ, slot=post.slot, num_ranks=here)
    return devices(launch, os.environ, slot=post.slot, local_rank=post.rank % here, num_ranks=here)


def _log_of(options: Options, post: Post) -> Path | None:
    """Trials that run side by side must not mix their lines, nor ranks that train one."""
    if post.rank:
        return options.paths.rank_log(options.submission, options.worker, *post)
    return options.paths.slot_log(options.submission, options.worker, post.slot) if options.slots > 1 else None


def _environment(plan: PlanFile, submission: str) -> dict[str, str]:
    threads = str(plan.spec.launch.cpus)
    fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    # Sets of texts are looped over in an order that depends on this; what a trial comes to must not.
    hashing = {"PYTHONHASHSEED": "0"}
    return {
        **os.environ,
        **hashing,
        **plan.spec.env,
        **fixed,
        "PYTHONUNBUFFERED": "1",
        MARK: mark(submission, os.environ),
    }


def _reduces_itself(paths: SweepPaths) -> bool:
    """Whether a worker reduces: a small sweep; and a large one whose reducers were here before its last outcome was."""
    plan = PlanFile.open(paths.plan)
    return plan.num_trials <= plan.spec.reduce.trials_per_range or paths.summary.exists()


def _reduce(paths: SweepPaths, *, alone: bool) -> int:
    from orchestrator.results import reducer

    return reducer.reduce(paths, wait_s=0.0, alone=alone)


def _parse(arguments: list[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(prog="orchestrator.supervisor")
    parser.add_argument("verb", choices=["work"])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--submission", required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--then-reduce", action="store_true")
    given = parser.parse_args(arguments)
    paths = SweepPaths(given.dir.absolute())
    options = Options(
        paths=paths,
        submission=given.submission,
        worker=given.worker,
        slots=given.slots,
        seat=Seat.of(os.environ),
    )
    return options, given.then_reduce


def _go_to_origin(paths: SweepPaths) -> None:
    """Run where the sweep file is, as the user did; a sweep that was moved to another machine runs where it is."""
    with contextlib.suppress(OSError):
        os.chdir(paths.root)
        os.chdir(os.fsdecode(paths.origin.read_bytes()))


def main(arguments: list[str] | None = None, signals: Signals | None = None) -> int:
    """Entry of the process; returns its exit code."""
    signals = signals or Signals()
    os.umask(0o077)
    adopt_orphans()
    options, then_reduce = _parse(arguments)
    if options.seat.rank == 0:
        touch(os.environ.get("ORC_READY"))  # the batch script sends no signal before
        if name := os.environ.get("ORC_NOTICE"):
            signals.add(name)
    _go_to_origin(options.paths)
    try:
        return _work(options, signals, then_reduce=then_reduce)
    except OrcError as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        scratch.clear()


def _work(options: Options, signals: Signals, *, then_reduce: bool) -> int:
    plan = PlanFile.open(options.paths.plan)
    if options.seat.world_size not in (1, plan.spec.launch.nodes):
        raise UsageError(
            f"this job step has {options.seat.world_size} tasks, and launch.nodes is {plan.spec.launch.nodes}: "
            "one supervisor runs on each node"
        )
    if options.seat.rank > 0:
        return _serve_first_node(options, plan, signals)
    supervisor = Supervisor(options, signals)
    code = supervisor.run()
    if code == 0 and then_reduce:
        return _reduce(options.paths, alone=True)
    if code == 0 and supervisor.is_sweep_done() and _reduces_itself(options.paths):
        # The reducer job will do the same, but only once Slurm has started it.
        _reduce(options.paths, alone=False)
    return code


def _serve_first_node(options: Options, plan: PlanFile, signals: Signals) -> int:
    line = call(options.folder, options.seat.rank, within_s=_FAR_S)
    if line is None:
        return 0
    Outpost(_new_children(options, plan), line, signals, silent_s=plan.spec.launch.silent_s).run()
    shutil.rmtree(options.folder, ignore_errors=True)  # as the first node does, unless it was killed
    return 0
