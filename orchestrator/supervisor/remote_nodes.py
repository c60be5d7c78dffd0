"""Workers on the other nodes of a job, as the supervisor on its first node sees them.

    outposts = Outposts(folder, num_nodes=2, ranks_per_node=2)
    outposts.open(addresses)                        publishes where it listens
    for event in outposts.poll(): ...               Heard and Exited, after its descriptor became readable
    outposts.worker(Post(slot, rank)).channel.send(message)

On each other node `supervisor.node_agent` connects to the port that is written in a file of the job's own folder, which
all nodes see and only this user reads, together with a key. Either side proves that it has read the key before a word
of the other's counts; a stranger is hung up on. From then on they exchange messages of `orchestrator.core.channel`:

    from here   {"start": post}  {"to": post, "message": message}  {"tell": post, "word": word}  {"kill": post}
    from there  {"ready": true}  {"broken": text}  {"lost": text}  {"from": post, "message": message}
                {"exited": post, "status": wait status}  {"beat": true}, every few seconds

where a post is [slot, rank]. When the connection ends, so do the workers of that node; a node that says nothing for
long is as good as gone.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from orchestrator.core import atomic
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel
from orchestrator.errors import OrcError, ProgramError
from orchestrator.supervisor.worker_pool import Exited, Post

__all__ = ["BEAT_S", "FarWorker", "Heard", "Line", "NodeLost", "Outposts", "addresses", "call"]

BEAT_S = 5.0
"""How often a node gives a sign of life, at least, in seconds."""

_FILE = "outposts"
_MOST_BYTES = 4096
"""Of a stranger's words, before they are hung up on."""
_MOST_GUESTS = 64
_CONNECT_S = 30.0
"""How long the first node may take to answer, in seconds: it may be at a fold."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_UNANSWERED_MS = 60_000
"""After how long without an acknowledgement what was sent is given up (TCP_USER_TIMEOUT, tcp(7))."""


class NodeLost(OrcError):
    """A node of this job is gone, or doesn't answer any more; its ranks with it."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A worker has said something."""

    post: Post
    message: JsonObject


@dataclass(frozen=True, slots=True)
class Line:
    """To a worker on another node, by way of its outpost."""

    channel: Channel
    post: Post

    def send(self, message: JsonObject) -> None:
        """As `Channel.send`."""
        self.channel.send({"to": list(self.post), "message": message})


@dataclass(frozen=True, slots=True)
class FarWorker:
    """A worker process on another node."""

    post: Post
    channel: Line

    def tell(self, word: str) -> None:
        """As `children.Worker.tell`."""
        self.channel.channel.send({"tell": list(self.post), "word": word})


@dataclass(slots=True)
class _Guest:
    """Who has connected, and has not yet proved to be one of us."""

    sock: socket.socket
    said: bytes = b""


@dataclass(slots=True)
class _Node:
    """An outpost."""

    number: int
    host: str
    channel: Channel
    heard_s: float
    is_ready: bool = False
    workers: dict[Post, FarWorker] = field(default_factory=dict)


class Outposts:
    """The other nodes of this job.

    Args:
        folder: of the job, mode 0700, on a file system that all its nodes see.
        num_nodes: of the job, this one included.
        ranks_per_node: ranks of a trial on each of them: rank r is on node r // ranks_per_node.
        silent_s: after how long without a sign of life a node counts as lost, in seconds.
        clock: seconds, monotonic.

    Raises:
        ProgramError: from `poll`, when the program can't be imported on one of them.
        NodeLost: from `poll` and `look`, when one of them is gone.
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
        atomic.write(self._folder / _FILE, atomic.checked(content))

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

    def has(self, post: Post) -> bool:
        """Whether a post is on another node."""
        return post.rank >= self._ranks_per_node

    def worker(self, post: Post) -> FarWorker:
        """The worker of a post, which may have to be started."""
        node = self._nodes[post.rank // self._ranks_per_node]
        if post not in node.workers:
            node.channel.send({"start": list(post)})
            node.workers[post] = FarWorker(post, Line(node.channel, post))
        return node.workers[post]

    @property
    def workers(self) -> list[FarWorker]:
        """All of them."""
        return [worker for node in self._nodes.values() for worker in node.workers.values()]

    def kill(self, post: Post) -> None:
        """As `Children.kill`."""
        self._nodes[post.rank // self._ranks_per_node].channel.send({"kill": list(post)})

    # What they say

    def poll(self) -> Iterator[Heard | Exited]:
        """Take what has come; doesn't wait."""
        for number, _ in self._poll.poll(0):
            if self._listener is not None and number == self._listener.fileno():
                self._greet()
            elif number in self._guests:
                self._hear_out(number)
            else:
                # Who was hung up on since the look at all of them is none of these any more.
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
            data = guest.sock.recv(_MOST_BYTES)
        except OSError:
            data = b""
        guest.said += data
        if data and b"\n" not in guest.said and len(guest.said) < _MOST_BYTES:
            return
        self._poll.unregister(number)
        del self._guests[number]
        if not self._admit(guest):
            guest.sock.close()

    def _admit(self, guest: _Guest) -> bool:
        line, _, rest = guest.said.partition(b"\n")
        match None if rest else _said(line):
            case {"node": int(number), "salt": str(salt), "proof": str(proof), "host": str(host)}:
                pass
            case _:
                return False
        if not _proves(proof, _proof(self._key, "outpost", number, salt)):
            return False
        if not 0 < number < self._num_nodes or not self._has_room_for(number):
            return False
        self.host = self.host or str(guest.sock.getsockname()[0])
        _prepare(guest.sock)
        with contextlib.suppress(OSError):  # who has hung up meanwhile is noticed when reading
            guest.sock.sendall(atomic.checked({"proof": _proof(self._key, "first", number, salt)}))
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

    def _take(self, node: _Node) -> Iterator[Heard | Exited]:
        node.heard_s = self._watched_s
        for message in node.channel.receive():
            if "ready" in message:
                node.is_ready = True
                self._close_door()
            elif "broken" in message:
                raise ProgramError(f"on node {node.number} ({node.host}): {message['broken']}")
            elif "lost" in message:
                raise NodeLost(f"node {node.number} ({node.host}) of this job: {message['lost']}")
            elif "from" in message:
                yield Heard(Post.of(message["from"]), cast("JsonObject", message["message"]))
            elif "exited" in message:
                post = Post.of(message["exited"])
                node.workers.pop(post, None)
                yield Exited(post, int(str(message["status"])))
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

    def look(self) -> float:
        """See whether all still give signs of life; returns in how many seconds to look again.

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
                atomic.write(self._folder / _FILE, atomic.checked({"over": True}))

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


def addresses(environment: Mapping[str, str]) -> list[str]:
    """Under which the other nodes of a job may reach this one, its first: what srun says of it, then its names."""
    names = (environment.get(name) for name in ("SLURM_LAUNCH_NODE_IPADDR", "SLURMD_NODENAME"))
    return list(dict.fromkeys(name for name in (*names, socket.gethostname()) if name))


def call(folder: Path, node: int, *, within_s: float) -> Channel | None:
    """The line from node `node` to the first one, for which it waits; None when that one had nothing to do, and left.

    What is there may be an earlier run's, which the first node replaces.

    Raises:
        OrcError: not in time.
    """
    until, pause_s = time.monotonic() + within_s, _SHORTEST_PAUSE_S
    reason = f"{folder / _FILE} has not appeared"
    while True:
        try:
            return _knock(folder, node)
        except _Over:
            return None
        except (OSError, _Unknown) as error:
            reason = str(error)
        if time.monotonic() >= until:
            raise OrcError(f"node {node} of this job can't reach its first node within {within_s:.0f} s: {reason}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class _Over(Exception):
    """The first node has left."""


class _Unknown(Exception):
    """Who listens there, or what the file says, is nothing of ours."""


def _knock(folder: Path, node: int) -> Channel:
    hosts, port, key = _read(folder / _FILE)
    problems = []
    for host in hosts:
        try:
            return _introduce(host, port, key, node)
        except (OSError, _Unknown) as error:
            problems.append(f"{host}:{port}: {error}")
    raise _Unknown("; ".join(problems) or "it names no address")


def _read(file: Path) -> tuple[list[str], int, str]:
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        about = os.fstat(opened.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise _Unknown(f"{file}: is not a file of this user alone, with mode 0600")
        line = opened.read(_MOST_BYTES)
    match _said(line.removesuffix(b"\n")):
        case {"hosts": list(hosts), "port": int(port), "key": str(key)}:
            return [str(host) for host in hosts], port, key
        case {"over": True}:
            raise _Over
    raise _Unknown(f"{file}: says nothing that can be understood")


def _introduce(host: str, port: int, key: str, node: int) -> Channel:
    sock, salt = socket.create_connection((host, port), timeout=_CONNECT_S), secrets.token_hex(16)
    try:
        hello: JsonObject = {
            "node": node,
            "salt": salt,
            "host": socket.gethostname(),
            "proof": _proof(key, "outpost", node, salt),
        }
        sock.sendall(atomic.checked(hello))
        if not _proves(str(_said(_line(sock)).get("proof")), _proof(key, "first", node, salt)):
            raise _Unknown("who listens there is not the first node of this job")
    except BaseException:
        sock.close()
        raise
    sock.settimeout(None)
    _prepare(sock)
    return Channel(sock)


def _line(sock: socket.socket) -> bytes:
    """A line, and nothing of what comes after it."""
    found = b""
    while not found.endswith(b"\n") and len(found) < _MOST_BYTES and (data := sock.recv(1)):
        found += data
    return found.removesuffix(b"\n")


def _said(line: bytes) -> JsonObject:
    """The message of a line; an empty one for what is none."""
    try:
        return atomic.unchecked(line) or {}
    except ValueError:
        return {}


def _proves(proof: str, expected: str) -> bool:
    return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())


def _proof(key: str, who: str, node: int, salt: str) -> str:
    return hmac.digest(key.encode(), f"{who} {node} {salt}".encode(), "sha256").hex()


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


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
