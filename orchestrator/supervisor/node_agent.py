"""The agent on each further node of a job: it starts workers there, passes on what they say, and decides nothing.

The supervisor on the job's first node tells it what to do; see `supervisor.remote_nodes`. Slurm's signals reach every
process of a job's step. The supervisor decides what they mean, so here they are ignored. When the connection to it
ends, the workers of this node are ended, whatever they do.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.core.channel import Channel
from orchestrator.core.liveness import ProcessState, RankProcess, StallDetector
from orchestrator.core.messages import (
    AttemptEnded,
    AttemptMessage,
    Cause,
    FromWorker,
    Heartbeat,
    ImportDone,
    ImportFailed,
    KillWorker,
    Malformed,
    Message,
    NodeFailed,
    RankMember,
    RankStarted,
    RankStopped,
    StartWorker,
    TellWorker,
    ToWorker,
    WorkerExited,
    WorkerId,
)
from orchestrator.core.signals import Signals
from orchestrator.errors import OrcError, ProgramError
from orchestrator.supervisor.local_workers import LocalWorkers, memory_kills
from orchestrator.supervisor.remote_nodes import BEAT_S

__all__ = ["NodeAgent"]

LOOK_S = 1.0
"""How often to look at the workers, in seconds."""


@dataclass(slots=True)
class _Watched:
    """A rank at work, on which trial and attempt, and how often memory had run out before it was."""

    process: RankProcess
    stalls: StallDetector
    index: int
    attempt: int
    memory_kills: int


class NodeAgent:
    """Serves the supervisor until it closes the connection.

    Args:
        workers: those of this node; not opened yet.
        line: to the supervisor.
        signals: of this process.
        silent_s: how long a worker may be stopped, in seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        workers: LocalWorkers,
        line: Channel,
        signals: Signals,
        *,
        silent_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._line = line
        self._signals = signals
        self._silent_s = silent_s
        self._clock = clock
        self._watched: dict[WorkerId, _Watched] = {}
        self._looked_s = clock()
        self._watched_s = 0.0
        self._is_ready = False
        self._next_beat_s = 0.0
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serve; return when the supervisor has closed the connection and nothing is left running."""
        try:
            self._workers.open()
            for source, react in (
                (self._line, self._on_line),
                (self._signals, self._on_signals),
                (self._workers.channel, self._on_forkserver),
            ):
                self._selector.register(source, selectors.EVENT_READ, react)
            while not self._line.closed:
                for key, _ in self._selector.select(LOOK_S):
                    key.data()
                self._check()
        except ProgramError as error:
            self._line.send(ImportFailed(error=str(error)))
        except OrcError as error:
            self._line.send(NodeFailed(reason=str(error)))
        finally:
            self._workers.stop()
            self._line.close()

    # What the supervisor says

    def _on_line(self) -> None:
        for message in self._line.receive():
            match message:
                case StartWorker(worker=worker):
                    self._start(worker)
                case KillWorker(worker=worker):
                    self._workers.kill(worker)
                # A worker that is not there has just ended, which is on its way to the supervisor.
                case ToWorker(worker=worker, body=body) if worker in self._workers.workers:
                    self._workers.workers[worker].channel.send(body)
                case TellWorker(worker=worker, action=action) if worker in self._workers.workers:
                    self._workers.workers[worker].tell(action)
                case Malformed(error=error):
                    raise OrcError(f"the job's first node sent what is no message: {error}")

    def _start(self, worker: WorkerId) -> None:
        channel = self._workers.start(worker).channel
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._on_worker(worker, channel))

    # What happens here

    def _on_signals(self) -> None:
        self._signals.take()
        for exited in list(self._workers.reap()):
            self._on_exit(exited)

    def _on_forkserver(self) -> None:
        for exited in self._workers.poll():
            self._on_exit(exited)
        if self._workers.ready and not self._is_ready:
            self._is_ready = True
            self._line.send(ImportDone())
        if self._workers.channel.closed:
            self._selector.unregister(self._workers.channel)

    def _on_worker(self, worker: WorkerId, channel: Channel) -> None:
        if channel.closed:
            return
        for message in channel.receive():
            self._relay(worker, message)
        if channel.closed:
            self._selector.unregister(channel)

    def _relay(self, worker: WorkerId, message: Message) -> None:
        if isinstance(message, AttemptMessage) and isinstance(message.body, RankStarted):
            process = RankProcess.of(worker.rank, message.body.pid)
            self._watch(worker, process, message)
            member = RankMember(pid=process.pid, start=process.start, host=process.host, space=process.space)
            message = replace(message, body=member)
        self._send_from(worker, message)

    def _watch(self, worker: WorkerId, process: RankProcess, message: AttemptMessage) -> None:
        stalls = StallDetector([process], silent_s=self._silent_s, clock=lambda: self._watched_s)
        self._watched[worker] = _Watched(process, stalls, message.index, message.attempt, memory_kills())

    def _send_from(self, worker: WorkerId, message: Message) -> None:
        self._line.send(FromWorker(**worker._asdict(), body=message))

    def _send_for(self, worker: WorkerId, watched: _Watched, body: Message) -> None:
        self._send_from(worker, AttemptMessage(index=watched.index, attempt=watched.attempt, body=body))

    def _on_exit(self, exited: WorkerExited) -> None:
        worker = exited.worker
        channel = self._workers.workers[worker].channel
        if not channel.closed:
            for message in channel.receive_rest():
                self._relay(worker, message)
            self._selector.unregister(channel)
        self._workers.forget(worker)
        watched = self._watched.pop(worker, None)
        if watched is not None and exited.status == signal.SIGKILL and memory_kills() > watched.memory_kills:
            self._send_for(worker, watched, AttemptEnded(cause=Cause.MEMORY, detail="killed by SIGKILL"))
        self._line.send(exited)

    def _check(self) -> None:
        """Tell of workers that are stopped. Time in which nobody checked is not held against them."""
        now = self._clock()
        if now >= self._next_beat_s:
            self._next_beat_s = now + BEAT_S
            self._line.send(Heartbeat())
        self._watched_s += min(now - self._looked_s, 2 * LOOK_S)
        self._looked_s = now
        for worker, watched in list(self._watched.items()):
            detail = watched.stalls.check().get(worker.rank)
            if detail is not None and watched.process.state() is ProcessState.STOPPED:
                del self._watched[worker]
                self._send_for(worker, watched, RankStopped(detail=detail))
