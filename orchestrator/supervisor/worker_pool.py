"""The workers of a job, on this machine and on the job's other nodes, behind one face.

pool.open()                                 start importing the program, on all nodes
pool.is_ready                               workers can be started
pool.send(worker, message)                  start the worker if there is none
for message in pool.poll(): ...             FromWorker and WorkerExited, after the pool became readable
pool.stop()                                 end all of them
"""

from __future__ import annotations

import math
import os
import selectors
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.core.channel import Channel
from orchestrator.core.messages import FromWorker, Idle, Message, RunTrial, WorkerExited, WorkerId
from orchestrator.core.slurm_env import LOOPBACK
from orchestrator.errors import OrcError, ProgramError
from orchestrator.supervisor.local_workers import LocalWorkers
from orchestrator.supervisor.node_handshake import addresses
from orchestrator.supervisor.remote_nodes import RemoteNodes

__all__ = ["FAR_S", "WorkerPool"]

FAR_S = 180.0
"""How long the other nodes of a job may take to come, in seconds: shared file systems show files after a minute."""


class WorkerPool:
    """Starts workers, carries messages to and from them, and tells how they ended.

    Args:
        local: the workers of this machine.
        remote: the job's other nodes; None where there is none.
        folder: where the nodes meet.
        import_s: how long importing the program may take, in seconds.
    """

    def __init__(self, local: LocalWorkers, remote: RemoteNodes | None, *, folder: Path, import_s: float) -> None:
        self._local = local
        self._remote = remote
        self._folder = folder
        self._import_s = import_s
        self._import_by = 0.0
        self._busy: set[WorkerId] = set()
        self._selector = selectors.DefaultSelector()

    def fileno(self) -> int:
        """Readable when `poll` has something to do, so that a selector takes this object."""
        return self._selector.fileno()

    def open_nodes(self) -> None:
        """Let the other nodes come, even if there turns out to be nothing to do for them.

        Raises:
            OrcError: the folder where they meet can't be made.
        """
        if self._remote is None:
            return
        shutil.rmtree(self._folder, ignore_errors=True)  # of an earlier job with our number
        try:
            self._folder.mkdir(mode=0o700)
        except OSError as error:
            raise OrcError(f"{self._folder}: the nodes of this job can't meet there: {error.strerror}") from error
        self._remote.open(addresses(os.environ))
        self._selector.register(self._remote, selectors.EVENT_READ)

    def open(self) -> None:
        """Import the program: seconds that a supervisor that has found nothing to do never spends."""
        self._local.open()
        self._import_by = time.monotonic() + self._import_s
        self._selector.register(self._local.channel, selectors.EVENT_READ)

    @property
    def is_ready(self) -> bool:
        """Whether workers can be started, on all nodes."""
        return self._local.ready and (self._remote is None or self._remote.ready)

    def import_left_s(self) -> float:
        """Return how many seconds importing may still take; infinity once it is done.

        Raises:
            ProgramError: none.
            OrcError: another node has not come in time.
        """
        if self.is_ready:
            return math.inf
        left = self._import_by - time.monotonic()
        if self._remote is not None and self._local.ready:
            left += FAR_S
            if left <= 0:
                raise OrcError(self._remote.missing())
        if left <= 0:
            raise ProgramError(
                f"the program can't be imported on this machine in {self._import_s:.0f} s; see launch.import_timeout_s"
            )
        return left

    @property
    def host(self) -> str:
        """Where the workers of all nodes reach those of this machine."""
        return LOOPBACK if self._remote is None else self._remote.host

    def is_free(self, slot: int) -> bool:
        """Whether a slot's workers take a trial: none of them still ends what its last one has left running."""
        return all(worker.slot != slot for worker in self._busy)

    # To workers

    def send(self, worker: WorkerId, message: Message) -> None:
        """Send a message to a worker, which is started if there is none."""
        if self._remote is not None and self._remote.has(worker):
            self._remote.send(worker, message)
            return
        if worker not in self._local.workers:
            channel = self._local.start(worker).channel
            self._selector.register(channel, selectors.EVENT_READ, worker)
        if isinstance(message, RunTrial):
            self._busy.add(worker)
        self._local.workers[worker].channel.send(message)

    def tell(self, action: str) -> None:
        """Pass a notice on to every worker."""
        for worker in self._local.workers.values():
            worker.tell(action)
        if self._remote is not None:
            self._remote.tell(action)

    def kill(self, worker: WorkerId) -> None:
        """End a worker that won't leave; its `WorkerExited` comes as ever."""
        if self._remote is not None and self._remote.has(worker):
            self._remote.kill(worker)
        else:
            self._local.kill(worker)

    # From workers

    def poll(self) -> Iterator[FromWorker | WorkerExited]:
        """Yield what workers say, and which have ended; doesn't wait.

        Raises:
            ProgramError: the program can't be imported on one of the nodes.
            NodeLost: a node is gone.
            OrcError: workers can't be started any more.
        """
        for key, _ in self._selector.select(0):
            if key.fileobj is self._remote and self._remote is not None:
                yield from self._remote.poll()
            elif key.fileobj is self._local.channel:
                yield from self._poll_forkserver()
            elif isinstance(key.fileobj, Channel):
                yield from self._read(key.data, key.fileobj)

    def _poll_forkserver(self) -> Iterator[FromWorker | WorkerExited]:
        for exited in self._local.poll():
            yield from self._exited(exited)
        if self._local.channel.closed:
            self._selector.unregister(self._local.channel)

    def _read(self, worker: WorkerId, channel: Channel) -> Iterator[FromWorker]:
        if channel.closed:
            return  # read to its end by an event that came at the same time
        for message in channel.receive():
            if isinstance(message, Idle):
                self._busy.discard(worker)
            else:
                yield FromWorker(**worker._asdict(), body=message)
        if channel.closed:
            self._selector.unregister(channel)

    def reap(self) -> Iterator[FromWorker | WorkerExited]:
        """Yield what there is of workers that have ended as direct children, after a SIGCHLD."""
        for exited in list(self._local.reap()):
            yield from self._exited(exited)

    def _exited(self, exited: WorkerExited) -> Iterator[FromWorker | WorkerExited]:
        """Yield what a worker has said last, then its end."""
        worker = exited.worker
        channel = self._local.workers[worker].channel
        if not channel.closed:
            for message in channel.receive_rest():
                yield FromWorker(**worker._asdict(), body=message)
            self._selector.unregister(channel)
        self._local.forget(worker)
        self._busy.discard(worker)
        yield exited

    def check_nodes(self) -> float:
        """Check that all nodes give signs of life; return in how many seconds to check again.

        Raises:
            NodeLost: one does not.
        """
        return math.inf if self._remote is None else self._remote.check()

    def stop(self) -> None:
        """End every worker and what it has started, and wait for that."""
        try:
            if self._remote is not None:
                self._remote.stop()
        finally:
            self._local.stop()
