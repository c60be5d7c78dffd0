"""The worker processes of this machine, forked from a preloaded parent (the forkserver) where that is safe.

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

from orchestrator.core import guardian, scratch
from orchestrator.core.channel import Channel
from orchestrator.core.messages import (
    Forked,
    ForkWorker,
    ImportDone,
    ImportFailed,
    Malformed,
    Notice,
    WorkerExited,
    WorkerId,
)
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process_tree import children, end_descendants, start_time
from orchestrator.core.signals import name_of
from orchestrator.errors import OrcError, ProgramError

__all__ = ["LocalWorker", "LocalWorkers", "memory_kills"]

_GROUPS = Path("/sys/fs/cgroup")
_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(slots=True)
class LocalWorker:
    """A worker process of this machine.

    Args:
        id: its name.
        channel: to it.
        pid: its process id; None until it is known.
        process: set when it is a direct child of ours.
        told: a notice was passed on to it.
    """

    id: WorkerId
    channel: Channel
    pid: int | None = None
    process: subprocess.Popen[bytes] | None = None
    told: bool = False

    def tell(self, action: str) -> None:
        """Pass a notice on: what to do, by a message; and a signal, so that one at work looks for the message."""
        self.told = True
        self.channel.send(Notice(action=action))
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


class LocalWorkers:
    """Starts workers and tells how they ended.

    After `open`, the preloaded parent imports while the supervisor goes on; workers can be started once it is `ready`.

    Args:
        paths: the sweep.
        environment: of every child.
        log_of: the log file of a worker; None prints where this process does.
        has_ranks: several ranks train each trial, and meet in a folder.
        folder: where they meet, removed in the end; None for a new one on this machine.
        devices_of: the GPUs of a worker, as CUDA_VISIBLE_DEVICES names them; None leaves that variable alone.

    """

    def __init__(
        self,
        paths: SweepPaths,
        environment: dict[str, str],
        log_of: Callable[[WorkerId], Path | None] = lambda _: None,
        *,
        has_ranks: bool = False,
        folder: Path | None = None,
        devices_of: Callable[[WorkerId], str | None] = lambda _: None,
    ) -> None:
        self._paths = paths
        self._environment = environment
        self._log_of = log_of
        self._has_ranks = has_ranks
        self._folder = None if folder is None else str(folder)
        self._devices_of = devices_of
        self.workers: dict[WorkerId, LocalWorker] = {}
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

    def start(self, worker: WorkerId) -> LocalWorker:
        """Start a worker; there must be none of its name."""
        assert self.ready
        assert worker not in self.workers
        self.workers[worker] = self._fork(worker) if self._forks else self._start_fresh(worker)
        return self.workers[worker]

    def _fork(self, worker: WorkerId) -> LocalWorker:
        ours, theirs = socket.socketpair()
        with theirs:
            # One request a message: a read takes the descriptors of one, and of no more than one.
            log, devices = self._log(worker), self._devices_of(worker)
            request = ForkWorker(slot=worker.slot, rank=worker.rank, log=log, devices=devices)
            self.channel.send(request, (theirs.fileno(),))
        return LocalWorker(worker, Channel(ours))

    def _start_fresh(self, worker: WorkerId) -> LocalWorker:
        log = self._log(worker)
        process, channel = self._spawn("--fresh", *(("--log", log) if log else ()), devices=self._devices_of(worker))
        return LocalWorker(worker, channel, process.pid, process)

    def _log(self, worker: WorkerId) -> str | None:
        path = self._log_of(worker)
        return None if path is None else str(path)

    def poll(self) -> Iterator[WorkerExited]:
        """Take the news from the preloaded parent, after its channel became readable; yield the workers that ended.

        Raises:
            ProgramError: the program can't be imported here; carries its own error.
            OrcError: the preloaded parent has ended.
        """
        for message in self.channel.receive():
            match message:
                case ImportFailed(error=error):
                    raise ProgramError(f"the program can't be imported on this machine: {error}")
                case ImportDone(forks=forks):
                    self.ready, self._forks = True, forks
                case Forked(worker=worker, pid=pid) if worker in self.workers:
                    self.workers[worker].has_pid(pid)
                case WorkerExited():
                    yield message
                case Malformed(error=error):
                    raise OrcError(f"the process that starts the workers sent what is no message: {error}")
        if self.channel.closed and self._forks:
            if self.ready:
                raise OrcError(f"the process that starts the workers {self._server_end()}; the work can go on later")
            raise ProgramError(f"the process that imports the program {self._server_end()} before any trial could run")

    def _server_end(self) -> str:
        assert self._server is not None
        code = self._server.wait()
        return f"was killed by {name_of(-code)}" if code < 0 else f"left with exit code {code}"

    def reap(self) -> Iterator[WorkerExited]:
        """Yield direct children that have ended, after a SIGCHLD; end what one of them has left running."""
        for worker in list(self.workers.values()):
            if worker.process is not None and _has_ended(worker.process.pid):
                since = start_time(worker.process.pid)
                code = worker.process.wait()
                if code < 0:
                    # A guardian that was killed has ended nothing: what it left is ours now, and no older than it was.
                    end_descendants(keep=self._kept(), since=since)
                status = -code if code < 0 else code << 8
                yield WorkerExited(slot=worker.id.slot, rank=worker.id.rank, status=status)

    def kill(self, worker: WorkerId) -> None:
        """End a worker that won't leave; its `WorkerExited` comes as ever."""
        if worker in self.workers:
            self.workers[worker].end()

    def forget(self, worker: WorkerId) -> None:
        """Close the channel of a worker that has ended, once it is read to the end."""
        self.workers.pop(worker).channel.close()

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
