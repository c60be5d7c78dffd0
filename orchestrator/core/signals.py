"""Signals as data: a handler only notes what arrived, and wakes whoever waits."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Collection
from types import FrameType

__all__ = ["Signals", "name_of", "wait_readable"]

_NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def name_of(number: int) -> str:
    """Such as SIGTERM; `signal 40` for one that has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def wait_readable(handles: Collection[int], timeout_s: float | None) -> set[int]:
    """Wait until one of some file descriptors is readable, or at its end; return those that are.

    By poll(2): select(2) can't take descriptors from 1,024 on, and user code may have opened as many.
    """
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return {handle for handle, _ in poll.poll(None if timeout_s is None else 1000 * timeout_s)}


class Signals:
    """The notices that this process has received.

    Slurm, srun and a trap may send one event as TERM, as USR1, as CONT and TERM, once or twice: all of them mean the
    same. Installing comes first in a process, before anything slow.
    """

    def __init__(self) -> None:
        self._received: list[str] = []
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _NOTICES:
            signal.signal(number, self._note)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_NOTICES, signal.SIGCHLD})  # whoever started us may block them

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number).name)

    def fileno(self) -> int:
        """Readable after a signal, so that a selector takes this object."""
        return self._read

    def add(self, name: str) -> None:
        """Note a signal that somebody else received for us, such as the shell before we started."""
        self._received.append(name)
        os.write(self._write, b"\0")

    def take(self) -> list[str]:
        """The names of the notices since the last call."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 4096):
                pass
        found, self._received = self._received, []
        return found
