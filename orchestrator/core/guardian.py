"""The process above a worker, and above the forkserver: it ends what the one below it has started and left running.

    stand_guard([parent])       forks: the new process goes on, below a guardian that this one becomes
    begin("trial 3 attempt 0")  in a worker: what it runs from now on; the log names it with what was ended
    end()                       in a worker: end what that has left running, however it was detached

A guardian adopts whatever loses its parent below it (`core.process_tree`). What user code has started is thus the
guardian's to reap and to end, and never shows up among the children of the process in which that code runs. A worker's
own children stay for its next trials, since libraries keep pools of processes; they end with the worker.

A worker and its guardian lead one group, the guardian its head, and it ends with the worker's status: to everyone else
the two are one process, which passes USR1 on. `END` has it kill the worker, and end the rest in order. When one of its
parents is gone, all ends at once.

The guardian of a worker is forked from a process that has imported torch. It executes a Python of its own at once, so
that it takes 10 MB and not the hundreds that tools which add up the memory of processes would count.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

from orchestrator.core.process_tree import Ended, adopt_orphans, children_now, die_with_parent, end_descendants
from orchestrator.core.signals import name_of, wait_readable

__all__ = ["END", "begin", "end", "main", "stand_guard"]

END = signal.SIGRTMIN + 7
"""Kill the worker, and end in order what it leaves. Slurm sends none of the real-time signals by itself."""

_HEARS = (signal.SIGUSR1, signal.SIGCHLD, END)
_GRACE_S = 1.0
"""What is left running gets TERM, and KILL so much later, in seconds."""
_MOST_NAMED = 20
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from orchestrator.core.guardian import main; main()"

_guardian: socket.socket | None = None
"""Of this process, when it is a worker: the connection to its guardian."""


def stand_guard(parents: Iterable[int], *, patience_s: float = 0.0, folder: str = "") -> None:
    """Fork; returns in the new process, below a guardian that this one becomes. It must have a single thread.

    Args:
        parents: whose end is the end of all below the guardian. The first is the parent of this process.
        patience_s: how long the new process has to end by itself then, in seconds.
        folder: what is removed then; empty for nothing.
    """
    global _guardian
    first, *others = parents
    handles = [os.pidfd_open(first)]
    if os.getppid() != first:
        os._exit(1)
    for pid in others:
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    adopt_orphans()
    ours, theirs = socket.socketpair()
    for end_ in (ours, theirs):
        end_.settimeout(None)  # user code may have set a default
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARS)  # until there is someone to hear them
    me, ward = os.getpid(), os.fork()
    if ward == 0:
        die_with_parent(me)
        ours.close()
        for handle in handles:
            os.close(handle)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _guardian = theirs
        os.register_at_fork(after_in_child=theirs.close)
        return
    theirs.close()
    requests = ours.detach()
    for number in (requests, *handles):
        os.set_inheritable(number, True)
    post = json.dumps([ward, requests, handles, patience_s, folder])
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 (slow to import)
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _PROGRAM, here, post])  # noqa: S606 (no shell is meant)
    _Guardian(ward, requests, handles, patience_s, folder).run()


def begin(name: str) -> None:
    """Tell the guardian what the worker runs from now on."""
    _ask({"begin": name})


def end() -> None:
    """Have the guardian end what that has left running; returns when it has."""
    if _ask({"end": True}) and _guardian is not None:
        with contextlib.suppress(OSError):
            _guardian.recv(1)


def _ask(message: dict[str, object]) -> bool:
    if _guardian is None:
        return False
    with contextlib.suppress(OSError):
        _guardian.sendall(json.dumps(message).encode() + b"\n")
        return True
    return False


class _Guardian:
    """Watches one process, its ward.

    Args:
        ward: its process id, a child of this process.
        requests: a connection to it.
        parents: pidfds of the processes without which all below here ends.
        patience_s: how long the ward has to end by itself then, in seconds.
        folder: what is removed then; empty for nothing.
    """

    def __init__(self, ward: int, requests: int, parents: list[int], patience_s: float, folder: str) -> None:
        self._ward = ward
        self._requests = requests
        self._parents = frozenset(parents)
        self._patience_s = patience_s
        self._folder = folder
        self._buffer = b""
        self._name = ""
        self._is_told_to_end = False
        self._unkillable: set[tuple[int, int]] = set()
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _HEARS:
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # srun and Slurm send notices to every process of a step
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARS)

    def run(self) -> NoReturn:
        """Until the ward has ended, or a parent."""
        watched = {self._woken, self._requests, *self._parents}
        until: float | None = None
        self._reap()  # it may have ended before there was a handler
        while True:
            left_s = None if until is None else max(0.0, until - time.monotonic())
            ready = wait_readable(watched, left_s)
            if left_s == 0.0:
                self._end_all()
            if until is None and not self._parents.isdisjoint(ready):
                until = time.monotonic() + self._patience_s
                watched -= self._parents
            if self._woken in ready:
                self._on_signals()
            if self._requests in ready and not self._on_requests():
                watched.remove(self._requests)

    def _end_all(self) -> NoReturn:
        end_descendants()
        import shutil  # here, since a guardian as a rule needs neither

        from orchestrator.core import scratch

        scratch.clear()  # what those who were killed would have removed
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)

    def _on_signals(self) -> None:
        numbers: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            while some := os.read(self._woken, 4096):
                numbers.update(some)
        self._is_told_to_end = self._is_told_to_end or END in numbers
        for number, as_number in ((signal.SIGUSR1, signal.SIGUSR1), (END, signal.SIGKILL)):
            if number in numbers:
                with contextlib.suppress(ProcessLookupError):  # it is not reaped yet, so the number is its own
                    os.kill(self._ward, as_number)
        self._reap()

    def _reap(self) -> None:
        """Take the statuses of those that have ended; with the ward's, end."""
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid == self._ward:
                    while wait_readable([self._requests], 0) and self._on_requests():
                        pass  # what it began just before
                _, status = os.waitpid(ended.si_pid, 0)
                if ended.si_pid == self._ward:
                    self._leave(status)

    def _on_requests(self) -> bool:
        """Do what the ward asks for; returns whether it may ask for more."""
        try:
            some = os.read(self._requests, 65536)
        except OSError:
            some = b""
        *lines, self._buffer = (self._buffer + some).split(b"\n")
        for message in map(json.loads, lines):
            if "begin" in message:
                self._name = str(message["begin"])
            else:
                self._end_rest()
                self._name = ""
                with contextlib.suppress(OSError):
                    os.write(self._requests, b"\n")
        return bool(some)

    def _end_rest(self) -> None:
        """End what the ward has left running, and tell what that was."""
        if children_now() == frozenset({self._ward}):
            return
        ended = end_descendants(keep={self._ward}, ignore=self._unkillable, grace_s=_GRACE_S)
        self._unkillable |= ended.unkillable  # waited for once, and told once
        self._tell(ended)

    def _leave(self, status: int) -> NoReturn:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        if self._name and number is not None and not self._is_told_to_end:
            self._say(f"the worker was killed by {name_of(number)}")
        self._tell(end_descendants(ignore=self._unkillable, grace_s=_GRACE_S))
        if number is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError):  # KILL has no handler
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)

    def _tell(self, ended: Ended) -> None:
        told = [f"ended what was left running: {text}" for text in ended.gone]
        told += [f"still running, although killed: {text}" for text in ended.remaining]
        for line in told[:_MOST_NAMED]:
            self._say(line)
        if len(told) > _MOST_NAMED:
            self._say(f"and {len(told) - _MOST_NAMED} more")

    def _say(self, text: str) -> None:
        """A line into the log; one that has no room loses it."""
        begin = f"=== {self._name}: " if self._name else "=== "
        with contextlib.suppress(OSError):
            os.write(1, f"{begin}{text}\n".encode())


def main() -> NoReturn:
    """Entry of the process, whose argument holds those of `_Guardian`, as JSON."""
    _Guardian(*json.loads(sys.argv[1])).run()
