"""The children of a supervisor: worker processes, forked from a preloaded parent where that is safe.

Each slot runs one trial at a time: in one worker, which stays for the trials after it, or in one worker a rank.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from orchestrator.core import guardian, scratch
from orchestrator.core.atomic import JsonObject
from orchestrator.core.channel import Channel
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process_tree import children, end_descendants, start_time
from orchestrator.core.signals import name_of
from orchestrator.errors import OrcError, ProgramError

__all__ = ["Children", "Exited", "Post", "Worker", "memory_kills"]

_GROUPS = Path("/sys/fs/cgroup")
_DEVICES = "CUDA_VISIBLE_DEVICES"


class Post(NamedTuple):
    """Where a worker works.

    Args:
        slot: which of the trials that this supervisor runs side by side.
        rank: which of the processes that train it.
    """

    slot: int
    rank: int = 0

    @classmethod
    def of(cls, value: object) -> Post:
        """From a message, in which it is [slot, rank]."""
        assert isinstance(value, list)
        slot, rank = value
        return cls(int(slot), int(rank))


@dataclass(slots=True)
class Worker:
    """A worker process.

    Args:
        post: where it works.
        channel: to it.
        pid: its process id; None until it is known.
        process: set when it is a direct child of ours.
        told: a notice was passed on to it.
    """

    post: Post
    channel: Channel
    pid: int | None = None
    process: subprocess.Popen[bytes] | None = None
    told: bool = False

    def tell(self, word: str) -> None:
        """Pass a notice on: what to do, by a message; and a signal, to one that is at work."""
        self.told = True
        self.channel.send({"notice": word})
        self._send(signal.SIGUSR1)

    def has_pid(self, pid: int) -> None:
        """Note its process id, and send it the signal that waited for that."""
        self.pid = pid
        if self.told:
            self._send(signal.SIGUSR1)

    def end(self) -> None:
        """Kill it, and have its guardian end in order what it leaves."""
        self._send(guardian.END)

    def _send(self, number: int) -> None:
        # One that has just gone, of which we are to be told, is left alone.
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass(frozen=True, slots=True)
class Exited:
    """A worker process has ended, with this wait status."""

    post: Post
    status: int


class Children:
    """Starts workers and tells how they ended.

    After `open`, the preloaded parent imports while the supervisor goes on; workers can be started once it is `ready`.

    Args:
        paths: the sweep.
        environment: of every child.
        log_of: the log file of a worker; None prints where this process does.
        has_ranks: several ranks train each trial, and meet in a folder.
        folder: where they meet, removed in the end; None for a new one on this machine.
        devices_of: the GPUs of a worker, as CUDA_VISIBLE_DEVICES names them; None leaves that variable alone.

    Raises:
        ProgramError: from `poll`, when the program can't be imported here; carries its own error.
    """

    def __init__(
        self,
        paths: SweepPaths,
        environment: dict[str, str],
        log_of: Callable[[Post], Path | None] = lambda _: None,
        *,
        has_ranks: bool = False,
        folder: Path | None = None,
        devices_of: Callable[[Post], str | None] = lambda _: None,
    ) -> None:
        self._paths = paths
        self._environment = environment
        self._log_of = log_of
        self._has_ranks = has_ranks
        self._folder = None if folder is None else str(folder)
        self._devices_of = devices_of
        self.workers: dict[Post, Worker] = {}
        self.ready = False
        self._forks = True
        self._server: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._before: frozenset[int] = frozenset()

    def open(self) -> None:
        """Start the preloaded parent."""
        if self._has_ranks and self._folder is None:
            self._folder = str(scratch.make())
        self._before = children()  # such as what the batch script started before it became this process
        self._server, self._channel = self._spawn()

    @property
    def channel(self) -> Channel:
        """To the preloaded parent, once it was started."""
        assert self._channel is not None
        return self._channel

    def _spawn(self, *extra: str, devices: str | None = None) -> tuple[subprocess.Popen[bytes], Channel]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "orchestrator.worker.forkserver"),
                    *("--dir", str(self._paths.root), "--fd", str(theirs.fileno())),
                    *("--supervisor", str(os.getpid()), *extra),
                    *(("--folder", self._folder) if self._folder else ()),
                ],
                stdin=subprocess.DEVNULL,
                env=self._environment if devices is None else {**self._environment, _DEVICES: devices},
                pass_fds=[theirs.fileno()],
                process_group=0 if "--fresh" in extra else None,
            )
        return process, Channel(ours)

    def start(self, post: Post) -> Worker:
        """Start the worker of `post`; there must be none."""
        assert self.ready
        assert post not in self.workers
        self.workers[post] = self._fork(post) if self._forks else self._start_fresh(post)
        return self.workers[post]

    def _fork(self, post: Post) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            # One request a message: a read takes the descriptors of one, and of no more than one.
            request: JsonObject = {"fork": post.slot, "rank": post.rank, "log": self._log(post)}
            self.channel.send({**request, "devices": self._devices_of(post)}, (theirs.fileno(),))
        return Worker(post, Channel(ours))

    def _start_fresh(self, post: Post) -> Worker:
        log = self._log(post)
        process, channel = self._spawn("--fresh", *(("--log", log) if log else ()), devices=self._devices_of(post))
        return Worker(post, channel, process.pid, process)

    def _log(self, post: Post) -> str | None:
        path = self._log_of(post)
        return None if path is None else str(path)

    def poll(self) -> Iterator[Exited]:
        """Take the news from the preloaded parent, after its channel became readable; yields the workers that ended."""
        for message in self.channel.receive():
            if "broken" in message:
                raise ProgramError(f"the program can't be imported on this machine: {message['broken']}")
            if "ready" in message:
                self.ready, self._forks = True, bool(message["fork"])
            elif "forked" in message:
                self._note_pid(message)
            elif "exited" in message:
                yield Exited(_post(message, "exited"), int(str(message["status"])))
        if self.channel.closed and self._forks:
            if self.ready:
                raise OrcError(f"the process that starts the workers {self._server_end()}; the work can go on later")
            raise ProgramError(f"the process that imports the program {self._server_end()} before any trial could run")

    def _note_pid(self, message: JsonObject) -> None:
        worker = self.workers.get(_post(message, "forked"))
        if worker is not None:
            worker.has_pid(int(str(message["pid"])))

    def _server_end(self) -> str:
        assert self._server is not None
        code = self._server.wait()
        return f"was killed by {name_of(-code)}" if code < 0 else f"left with exit code {code}"

    def reap(self) -> Iterator[Exited]:
        """Direct children that have ended, after a SIGCHLD; what one of them has left running is ended."""
        for worker in list(self.workers.values()):
            if worker.process is not None and _has_ended(worker.process.pid):
                since = start_time(worker.process.pid)
                code = worker.process.wait()
                if code < 0:
                    # A guardian that was killed has ended nothing: what it left is ours now, and no older than it was.
                    end_descendants(keep=self._kept(), since=since)
                yield Exited(worker.post, -code if code < 0 else code << 8)

    def kill(self, post: Post) -> None:
        """End a worker that won't leave; `Exited` comes as ever."""
        worker = self.workers.get(post)
        if worker is not None:
            worker.end()

    def forget(self, post: Post) -> None:
        """The worker of `post` has ended and its channel is read to the end."""
        self.workers.pop(post).channel.close()

    def stop(self, grace_s: float = 4.0) -> None:
        """End every worker, the preloaded parent and all that they started, and wait for them."""
        if self._server is None:
            return
        try:
            self._hang_up()
            until = time.monotonic() + grace_s
            for process in self._processes():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            self._kill_rest()

    def _hang_up(self) -> None:
        """Close every channel. The preloaded parent's comes first: at its end that one ends all workers at once."""
        self.channel.close()
        for worker in self.workers.values():
            worker.channel.close()
            if worker.process is not None:
                worker.end()

    def _kill_rest(self) -> None:
        """Kill whoever hasn't left in time, and what those who should have ended it have left running."""
        for process in self._processes():
            if process.poll() is None:
                process.kill()
                process.wait()
        end_descendants(keep=self._before)
        self.workers.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _processes(self) -> list[subprocess.Popen[bytes]]:
        """Our direct children: the preloaded parent, and workers that were not forked."""
        fresh = (worker.process for worker in self.workers.values())
        return [process for process in (self._server, *fresh) if process is not None]

    def _kept(self) -> set[int]:
        return {*self._before, *(process.pid for process in self._processes())}


def _post(message: JsonObject, what: str) -> Post:
    return Post(int(str(message[what])), int(str(message["rank"])))


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; its status stays to be taken."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def memory_kills() -> int:
    """How many processes of our control group the kernel has killed for want of memory; 0 where it doesn't tell."""
    return sum(map(_oom_kills, _memory_files()))


def _memory_files() -> Iterator[Path]:
    """Where the kernel counts them for this process: a file of its group of version 2, of version 1, or of both."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield _GROUPS / group.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield _GROUPS / "memory" / group.lstrip("/") / "memory.oom_control"


def _oom_kills(events: Path) -> int:
    try:
        lines = events.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
