"""Workers on the other nodes of a job, as the supervisor on its first node sees them.

    nodes = RemoteNodes(folder, num_nodes=2, ranks_per_node=2)
    nodes.open(addresses)                           publishes where it listens
    for message in nodes.poll(): ...                FromWorker and WorkerExited, after its descriptor became readable
    nodes.send(WorkerId(slot, rank), message)

On each other node `supervisor.node_agent` connects to this one as `supervisor.node_handshake` says; the connection to a
stranger is closed. From then on the nodes exchange the messages of `orchestrator.core.messages`. When the connection
ends, so do the workers of that node; a node that is silent for long counts as lost.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel
from orchestrator.core.messages import (
    FromWorker,
    ImportDone,
    ImportFailed,
    KillWorker,
    Malformed,
    Message,
    NodeFailed,
    StartWorker,
    TellWorker,
    ToWorker,
    WorkerExited,
    WorkerId,
)
from orchestrator.errors import OrcError, ProgramError
from orchestrator.supervisor.node_handshake import FILE, MOST_BYTES, configure, parse, proof_of, proves

__all__ = ["BEAT_S", "NodeLost", "RemoteNodes"]

BEAT_S = 5.0
"""How often a node gives a sign of life, at least, in seconds."""

_MOST_GUESTS = 64


class NodeLost(OrcError):
    """A node of this job is gone, or doesn't answer any more; its ranks with it."""


@dataclass(slots=True)
class _Guest:
    """Who has connected, and has not yet proved to be one of us."""

    sock: socket.socket
    said: bytes = b""


@dataclass(slots=True)
class _Node:
    """Another node of the job, and which workers run there."""

    number: int
    host: str
    channel: Channel
    heard_s: float
    is_ready: bool = False
    workers: set[WorkerId] = field(default_factory=set)


class RemoteNodes:
    """The other nodes of this job.

    Args:
        folder: of the job, mode 0700, on a file system that all its nodes see.
        num_nodes: of the job, this one included.
        ranks_per_node: ranks of a trial on each of them: rank r is on node r // ranks_per_node.
        silent_s: after how long without a sign of life a node counts as lost, in seconds.
        clock: seconds, monotonic.

    Raises:
        ProgramError: from `poll`, when the program can't be imported on one of them.
        NodeLost: from `poll` and `check`, when one of them is gone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_nodes: int,
        ranks_per_node: int,
        silent_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._num_nodes = num_nodes
        self._ranks_per_node = ranks_per_node
        self._silent_s = silent_s
        self._clock = clock
        self._looked_s = clock()
        self._watched_s = 0.0
        self._key = secrets.token_hex(32)
        self._listener: socket.socket | None = None
        self._poll = select.epoll()
        self._guests: dict[int, _Guest] = {}
        self._nodes: dict[int, _Node] = {}
        self.host = ""
        """This node's address as the others reach it, once one of them has."""

    def open(self, hosts: Sequence[str]) -> None:
        """Listen, and publish under which names or addresses this node may be reached.

        Raises:
            OrcError: the folder can't be written.
        """
        self._listener = socket.create_server(("", 0), backlog=self._num_nodes + 8)
        self._listener.setblocking(False)
        self._poll.register(self._listener, select.EPOLLIN)
        content: JsonObject = {"hosts": list(hosts), "port": self._listener.getsockname()[1], "key": self._key}
        atomic.write(self._folder / FILE, atomic.checked(content))

    def fileno(self) -> int:
        """Readable when `poll` has something to do, so that a selector takes this object."""
        return self._poll.fileno()

    @property
    def ready(self) -> bool:
        """Whether workers can be started on all of them."""
        return len(self._nodes) == self._num_nodes - 1 and all(node.is_ready for node in self._nodes.values())

    def missing(self) -> str:
        """Which have not come, or not imported the program yet."""
        numbers = (str(number) for number in range(1, self._num_nodes) if not self._is_ready(number))
        return f"of {self._num_nodes} nodes of the job, not ready: {', '.join(numbers)}"

    def _is_ready(self, number: int) -> bool:
        return number in self._nodes and self._nodes[number].is_ready

    # Workers

    def has(self, worker: WorkerId) -> bool:
        """Whether a worker runs on another node."""
        return worker.rank >= self._ranks_per_node

    def send(self, worker: WorkerId, message: Message) -> None:
        """Send a message to a worker, which is started if there is none."""
        node = self._node_of(worker)
        if worker not in node.workers:
            node.channel.send(StartWorker(**worker._asdict()))
            node.workers.add(worker)
        node.channel.send(ToWorker(**worker._asdict(), body=message))

    def tell(self, action: str) -> None:
        """Pass a notice on to every worker."""
        for node in self._nodes.values():
            for worker in node.workers:
                node.channel.send(TellWorker(**worker._asdict(), action=action))

    def kill(self, worker: WorkerId) -> None:
        """End a worker that won't leave; its `WorkerExited` comes as ever."""
        self._node_of(worker).channel.send(KillWorker(**worker._asdict()))

    def _node_of(self, worker: WorkerId) -> _Node:
        return self._nodes[worker.rank // self._ranks_per_node]

    # What they say

    def poll(self) -> Iterator[FromWorker | WorkerExited]:
        """Yield what workers say, and which have ended; doesn't wait."""
        for number, _ in self._poll.poll(0):
            if self._listener is not None and number == self._listener.fileno():
                self._greet()
            elif number in self._guests:
                self._hear_out(number)
            else:
                # A node disconnected earlier in this loop is no longer in `_nodes`; its event is ignored.
                for node in [node for node in self._nodes.values() if node.channel.fileno() == number]:
                    yield from self._take(node)

    def _greet(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            self._guests[sock.fileno()] = _Guest(sock)
            self._poll.register(sock, select.EPOLLIN)
        if len(self._guests) > _MOST_GUESTS:  # whoever says nothing makes room for the others
            self._turn_out(next(iter(self._guests)))

    def _turn_out(self, number: int) -> None:
        self._poll.unregister(number)
        self._guests.pop(number).sock.close()

    def _hear_out(self, number: int) -> None:
        """Read on from who has not been admitted; hang up when that is nobody of ours."""
        guest = self._guests[number]
        try:
            data = guest.sock.recv(MOST_BYTES)
        except OSError:
            data = b""
        guest.said += data
        if data and b"\n" not in guest.said and len(guest.said) < MOST_BYTES:
            return
        self._poll.unregister(number)
        del self._guests[number]
        if not self._admit(guest):
            guest.sock.close()

    def _admit(self, guest: _Guest) -> bool:
        line, _, rest = guest.said.partition(b"\n")
        match None if rest else parse(line):
            case {"node": int(number), "salt": str(salt), "proof": str(proof), "host": str(host)}:
                pass
            case _:
                return False
        if not proves(proof, proof_of(self._key, "other", number, salt)):
            return False
        if not 0 < number < self._num_nodes or not self._has_room_for(number):
            return False
        self.host = self.host or str(guest.sock.getsockname()[0])
        configure(guest.sock)
        with contextlib.suppress(OSError):  # who has hung up meanwhile is noticed when reading
            guest.sock.sendall(atomic.checked({"proof": proof_of(self._key, "first", number, salt)}))
        self._nodes[number] = _Node(number, host, Channel(guest.sock), self._watched_s)
        self._poll.register(guest.sock, select.EPOLLIN)
        return True

    def _has_room_for(self, number: int) -> bool:
        """Whether a node has not come yet; one that wasn't answered in time comes again, and has hung up before."""
        before = self._nodes.get(number)
        if before is None or before.is_ready:
            return before is None
        self._forget(before)
        return True

    def _forget(self, node: _Node) -> None:
        self._poll.unregister(node.channel.fileno())
        node.channel.close()
        del self._nodes[node.number]

    def _take(self, node: _Node) -> Iterator[FromWorker | WorkerExited]:
        node.heard_s = self._watched_s
        for message in node.channel.receive():
            match message:
                case ImportDone():
                    node.is_ready = True
                    self._close_door()
                case ImportFailed(error=error):
                    raise ProgramError(f"on node {node.number} ({node.host}): {error}")
                case NodeFailed(reason=reason):
                    raise NodeLost(f"node {node.number} ({node.host}) of this job: {reason}")
                case Malformed(error=error):
                    raise NodeLost(f"node {node.number} ({node.host}) of this job sent what is no message: {error}")
                case FromWorker():
                    yield message
                case WorkerExited(worker=worker):
                    node.workers.discard(worker)
                    yield message
        if node.channel.closed:
            was_ready = node.is_ready
            self._forget(node)
            if was_ready:
                raise NodeLost(f"node {node.number} ({node.host}) of this job is gone, and its ranks with it")

    def _close_door(self) -> None:
        """Once all are here, nobody else has any business here."""
        if self.ready and self._listener is not None:
            self._poll.unregister(self._listener)
            self._listener.close()
            self._listener = None
            for number in list(self._guests):
                self._turn_out(number)

    def check(self) -> float:
        """Check that all still give signs of life; return in how many seconds to check again.

        Time in which nobody looked, since this process was suspended, is not held against them.
        """
        now = self._clock()
        since_s, self._looked_s = now - self._looked_s, now
        self._watched_s += min(since_s, 2 * BEAT_S)
        for node in self._nodes.values():
            silent_s = self._watched_s - node.heard_s
            if node.is_ready and silent_s > self._silent_s:
                raise NodeLost(
                    f"node {node.number} ({node.host}) of this job has given no sign of life for {silent_s:.0f} s"
                )
        with contextlib.suppress(OSError):
            os.utime(self._folder)  # a sign of our own: it is in use
        return BEAT_S

    def stop(self, grace_s: float = 5.0, late_s: float = 10.0) -> None:
        """Hang up, and wait until the others have ended their workers.

        Args:
            grace_s: how long each may take for that, in seconds.
            late_s: how long to wait for those that have not come yet, in seconds: they would wait for this one.
        """
        if self._poll.closed:
            return
        self._await_late(late_s)
        for guest in self._guests.values():
            guest.sock.close()
        _wait_for_end([node.channel for node in self._nodes.values()], grace_s)
        if self._listener is not None:
            self._listener.close()
        self._remove_folder()
        self._listener, self._guests, self._nodes = None, {}, {}
        self._poll.close()

    def _remove_folder(self) -> None:
        """What is left for those who have not come at all is a word that all is over; a reducer removes it later."""
        if self._listener is None or len(self._nodes) == self._num_nodes - 1:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            with contextlib.suppress(OrcError):
                atomic.write(self._folder / FILE, atomic.checked({"over": True}))

    def _await_late(self, late_s: float) -> None:
        until = time.monotonic() + late_s
        while self._listener is not None and len(self._nodes) < self._num_nodes - 1:
            if (left := until - time.monotonic()) <= 0:
                return
            for number, _ in self._poll.poll(left):
                if number == self._listener.fileno():
                    self._greet()
                elif number in self._guests:
                    self._hear_out(number)
                else:
                    self._poll.unregister(number)  # it is about to be hung up on


def _wait_for_end(channels: Sequence[Channel], grace_s: float) -> None:
    """Say to all that no more follows, and wait for their ends to close."""
    until = time.monotonic() + grace_s
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket(fileno=os.dup(channel.fileno()))) for channel in channels]
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.settimeout(max(0.001, until - time.monotonic()))
                while sock.recv(1 << 16):
                    sock.settimeout(max(0.001, until - time.monotonic()))
    for channel in channels:
        channel.close()
