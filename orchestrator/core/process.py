"""Processes that outlive the command that starts them: how to start, recognise, find and stop them.

    process = spawn(argv, output=log, env=env)         returns at once; the process has a session of its own
    process.state()                                    "alive", "gone", or "elsewhere" (started on another machine)
    process.stop()                                     TERM, then its group, then KILL

A process is known by its pid, its start time and the boot of its machine: a pid alone is given again after the process
has ended, and after a reboot.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.core.procfs import boot_id, process_stat
from orchestrator.errors import OrcError

if TYPE_CHECKING:
    from orchestrator.core.atomic import JsonObject

__all__ = ["Process", "cores", "find_processes", "poll", "processes_with", "processes_writing", "spawn"]

_PROC = Path("/proc")
_spawned: set[int] = set()
"""Children of this process that nobody else waits for."""
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
    """One process, distinguishable for ever from any other, also from a later one under the same pid.

    Args:
        pid: process id.
        start_time: when it started, in clock ticks since the boot (field 22 of /proc/PID/stat, proc(5)).
        boot_id: the kernel's random id of that boot.
        host: the machine's name.
    """

    pid: int
    start_time: int
    boot_id: str
    host: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process that has `pid` on this machine now, or None."""
        stat = process_stat(pid)
        if stat is None:
            return None
        return cls(pid=pid, start_time=stat.start, boot_id=boot_id(), host=os.uname().nodename)

    def to_json(self) -> JsonObject:
        """Return it as a JSON object."""
        return {"pid": self.pid, "start_time": self.start_time, "boot_id": self.boot_id, "host": self.host}

    @classmethod
    def from_json(cls, value: JsonObject) -> Process:
        """Read what `to_json` has returned.

        Raises:
            OrcError: a key is missing or of another type.
        """
        match value:
            case {"pid": int(pid), "start_time": int(start), "boot_id": str(boot), "host": str(host)}:
                return cls(pid=pid, start_time=start, boot_id=boot, host=host)
        raise OrcError(f"not a process: {value!r}")

    def alive(self) -> bool:
        """Return whether this very process runs on this machine. A zombie does not."""
        if self.pid in _spawned:
            with suppress(ChildProcessError):
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    _spawned.discard(self.pid)
        stat = process_stat(self.pid)
        return stat is not None and not stat.has_ended and stat.start == self.start_time and self.boot_id == boot_id()

    def state(self) -> Literal["alive", "gone", "elsewhere"]:
        """Return what can be told from here: a process of another machine is `elsewhere`."""
        if self.alive():
            return "alive"
        return "gone" if self.host == os.uname().nodename or self.boot_id == boot_id() else "elsewhere"

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this very process; do nothing when it has ended."""
        # Through a pidfd (pidfd_open(2)): between the look and the signal the pid can't come to mean another process.
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

    def stop(self, *, grace_s: float = 30.0, kill_s: float = 5.0) -> bool:
        """Stop a leader of its own group: TERM to it alone, so that it can end its children, then TERM and KILL to all.

        Args:
            grace_s: its time after the first TERM, in seconds.
            kill_s: its group's time after the second, in seconds.

        Returns:
            Whether it is gone; True also when it was before. Only this very process and its group are signalled.
        """
        steps = (
            (os.kill, signal.SIGTERM, grace_s),
            (os.killpg, signal.SIGTERM, kill_s),
            (os.killpg, signal.SIGKILL, kill_s),
        )
        for send, number, limit_s in steps:
            # Asked just before each signal: while this process has the number, it and the group's are its own.
            if not self.alive():
                break
            with suppress(ProcessLookupError):
                send(self.pid, number)
            poll(lambda: not self.alive(), limit_s, every_s=0.01)
        return self.state() == "gone"


def spawn(argv: Sequence[str], *, output: Path, env: Mapping[str, str]) -> Process:
    """Start a process that goes on when this one, its terminal or its session ends.

    It has a session of its own, no input, no open file of ours, and no ignored or blocked signal: it lives as if the
    system had started it.

    Args:
        argv: the command; its first word is a path or found on PATH.
        output: gets what it prints, appended.
        env: its environment.

    Raises:
        OrcError: it can't be started, or `output` can't be written; the message names which.
    """
    try:
        # Opened here, so that an error is known to be the file's.
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OrcError(f"{output}: can't be written: {error.strerror}") from error
    try:
        pid = os.posix_spawnp(
            argv[0],
            list(argv),
            dict(env),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, handle, 1),
                (os.POSIX_SPAWN_DUP2, handle, 2),
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                *((os.POSIX_SPAWN_CLOSE, inherited) for inherited in _inheritable()),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    except OSError as error:
        raise OrcError(f"{argv[0]}: can't be started: {error}") from error
    finally:
        os.close(handle)
    _spawned.add(pid)
    process = Process.of(pid)
    assert process is not None, "a child that was not waited for keeps its entry in /proc"
    return process


def _inheritable() -> list[int]:
    handles = []
    for entry in (_PROC / "self/fd").iterdir():
        with suppress(OSError):
            if int(entry.name) > 2 and os.get_inheritable(int(entry.name)):
                handles.append(int(entry.name))
    return handles


def find_processes(argument: str) -> list[Process]:
    """Return the processes of this user that have `argument` among their arguments, except this one."""
    return [process for process in map(Process.of, _having(argument)) if process and process.alive()]


def _having(argument: str) -> Iterator[int]:
    wanted = os.fsencode(argument)
    for folder in _PROC.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and wanted in (folder / "cmdline").read_bytes().split(b"\0"):
                yield int(folder.name)


def processes_with(settings: Collection[bytes]) -> Iterator[Process]:
    """Yield every process whose environment, as it was at its start, holds one of `settings` (`NAME=value`).

    This process and its ancestors are left out, and so is what this user may not look into.
    """
    wanted = set(settings)
    return _processes(lambda folder: not wanted.isdisjoint(_read(folder / "environ").split(b"\0")))


def processes_writing(folder: Path, *, program: str) -> Iterator[Process]:
    """Yield every process that has a file in `folder` open and whose program's name starts with `program`.

    What `processes_with` leaves out is left out here, too.
    """
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
    pids, pid = set(), os.getpid()
    while pid > 0:
        pids.add(pid)
        stat = process_stat(pid)
        pid = stat.parent if stat else 0
    return pids


def cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = _PROC / "self/cgroup") -> int:
    """Processors that this process may use: its affinity, and what control groups (version 1 and 2) leave of it."""
    quotas = [quota for folder in _groups(cgroups, membership) if (quota := _quota(folder)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *map(int, quotas)]))


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Folders of our control group and of every group around it."""
    try:
        entries = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = cgroups / controllers if controllers else cgroups
        own = top / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _quota(folder: Path) -> float | None:
    """Processors that a control group allows: `cpu.max` holds quota and period, version 1 has a file for each."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        return quota_us / int((folder / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    return None
