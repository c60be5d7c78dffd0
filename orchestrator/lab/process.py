"""Processes that outlive their parent, and how to be sure that a process is still the one it was.

A pid alone says nothing: it is given again after the process is gone, and after a reboot. A pid, a start time and a
boot id together mean one process, for ever. Signals go through a pidfd, so that nothing else is hit between look and
shot.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.procfs import boot_id, process_stat

__all__ = ["Process", "poll", "processes_with", "processes_writing", "spawn"]

_PROC = Path("/proc")
_FATAL = frozenset({signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGQUIT, signal.SIGABRT})


def poll(condition: Callable[[], bool], limit_s: float, *, every_s: float = 0.05) -> bool:
    """Whether `condition` came true within `limit_s` seconds; asked at least once."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every_s)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process for ever, never its successor under the same pid.

    Args:
        pid: process id.
        start_ticks: when it started, in clock ticks since boot (field 22 of /proc/PID/stat).
        boot: boot id of the machine that it ran on.
    """

    pid: int
    start_ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has `pid` now."""
        stat = process_stat(pid)
        return None if stat is None else cls(pid=pid, start_ticks=stat.start, boot=boot_id())

    def alive(self) -> bool:
        """Whether it still runs. One that has ended but was not waited for does not."""
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        stat = process_stat(self.pid)
        return stat is not None and not stat.has_ended and stat.start == self.start_ticks and self.boot == boot_id()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this very process; nothing happens when it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:
            return
        try:
            if self.alive():
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)

    def end(self, number: signal.Signals = signal.SIGTERM, *, limit_s: float = 10) -> None:
        """Send `number`; if it is one that ends a process, return once it has, with SIGKILL after `limit_s` seconds."""
        self.send(number)
        if number in _FATAL and not poll(lambda: not self.alive(), limit_s):
            self.send(signal.SIGKILL)
            poll(lambda: not self.alive(), limit_s)


def spawn(argv: list[str], *, output: Path, env: Mapping[str, str]) -> Process:
    """Start a program in a session of its own, with no input and what it prints appended to `output`.

    It inherits no open file and no ignored or blocked signal, so it lives as if the system had started it.

    Raises:
        OSError: the program can't be started.
    """
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        argv[0],
        argv,
        dict(env),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_CLOSE, handle) for handle in _inheritable()),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )
    process = Process.of(pid)
    assert process is not None, "a child that was not waited for keeps its entry in /proc"
    return process


def _inheritable() -> list[int]:
    found = []
    for entry in (_PROC / "self/fd").iterdir():
        with suppress(OSError):
            if int(entry.name) > 2 and os.get_inheritable(int(entry.name)):
                found.append(int(entry.name))
    return found


def processes_with(settings: Collection[bytes]) -> Iterator[Process]:
    """Every process whose environment, as it was at its start, holds one of `settings` (`NAME=value`).

    This process and its ancestors are left out, and so is what this user may not look into.
    """
    wanted = set(settings)
    return _processes(lambda folder: not wanted.isdisjoint(_read(folder / "environ").split(b"\0")))


def processes_writing(folder: Path, *, program: str) -> Iterator[Process]:
    """Every process that has a file in `folder` open and whose program's name starts with `program`; else as above."""
    start, inside = program.encode(), f"{folder}/"
    return _processes(
        lambda it: _read(it / "comm").startswith(start) and any(f.startswith(inside) for f in _open_files(it))
    )


def _processes(matches: Callable[[Path], bool]) -> Iterator[Process]:
    spared = _self_and_ancestors()
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) not in spared:
            process = Process.of(int(entry.name))
            if process is not None and matches(entry) and process.alive():
                yield process


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _open_files(process: Path) -> Iterator[str]:
    with suppress(OSError):
        for entry in (process / "fd").iterdir():
            with suppress(OSError):
                yield str(entry.readlink())


def _self_and_ancestors() -> set[int]:
    found, pid = set(), os.getpid()
    while pid > 0:
        found.add(pid)
        fields = _read(_PROC / str(pid) / "stat").rpartition(b")")[2].split()
        pid = int(fields[1]) if fields else 0
    return found
