"""Processes of this machine that outlive the command that starts them, and how many fit.

    process = local.start(argv, log=log, env=env)      returns at once; the process has a session of its own
    local.state(process)                               alive, gone, or elsewhere (started on another machine)
    local.stop(process)                                TERM, then its group, then KILL

A process is known by host, pid, start time and boot: a pid alone is reused, and signals go to nobody else.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.errors import OrcError
from orchestrator.procfs import boot_id, process_stat

if TYPE_CHECKING:
    from orchestrator.store import JsonObject

__all__ = ["Process", "alive", "cores", "find", "start", "state", "stop"]

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, for ever distinguishable from any other.

    Args:
        pid: its number.
        start_time: when it started, in clock ticks since the boot (field 22 of /proc/PID/stat).
        boot_id: the kernel's random id of that boot.
        host: the machine's name.
    """

    pid: int
    start_time: int
    boot_id: str
    host: str

    def to_json(self) -> JsonObject:
        """As a JSON object."""
        return {"pid": self.pid, "start_time": self.start_time, "boot_id": self.boot_id, "host": self.host}

    @classmethod
    def from_json(cls, value: JsonObject) -> Process:
        """Back from `to_json`.

        Raises:
            OrcError: a key is missing or of another type.
        """
        match value:
            case {"pid": int(pid), "start_time": int(start), "boot_id": str(boot), "host": str(host)}:
                return cls(pid=pid, start_time=start, boot_id=boot, host=host)
        raise OrcError(f"not a process: {value!r}")


def _identify(pid: int) -> Process | None:
    found = process_stat(pid)
    if found is None:
        return None
    return Process(pid=pid, start_time=found.start, boot_id=boot_id(), host=os.uname().nodename)


def start(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Process:
    """Start a process that stays when this one, its terminal or its session ends.

    Args:
        argv: the command; its first word is a path or found on PATH.
        log: gets what it prints, appended.
        env: its environment; None for ours.
        cwd: its working folder; None for ours.

    Raises:
        OrcError: it can't be started, or the log can't be written; names which.
    """
    # Imported here, since readers of the ledger need this module for its words only.
    import subprocess

    try:
        out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise OrcError(f"{log}: can't be written: {error.strerror}") from error
    try:
        child = subprocess.Popen(
            argv,
            close_fds=True,
            cwd=cwd,
            env=env,
            start_new_session=True,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            umask=0o077,
        )
    except OSError as error:
        raise OrcError(f"{argv[0]}: can't be started: {error}") from error
    finally:
        os.close(out)
    process = _identify(child.pid)
    assert process is not None, "a child that nobody has waited for keeps its entry"
    with warnings.catch_warnings():
        # Forgotten on purpose: `subprocess` reaps it with its next child, and need not warn that it still runs.
        warnings.simplefilter("ignore", ResourceWarning)
        del child
    return process


def alive(process: Process) -> bool:
    """Whether this very process runs on this machine; a zombie doesn't."""
    found = process_stat(process.pid)
    return (
        found is not None and not found.has_ended and found.start == process.start_time and process.boot_id == boot_id()
    )


def state(process: Process) -> Literal["alive", "gone", "elsewhere"]:
    """As far as it can be told from here: a process of another machine is `elsewhere`."""
    if alive(process):
        return "alive"
    here = process.host == os.uname().nodename or process.boot_id == boot_id()
    return "gone" if here else "elsewhere"


def find(word: str) -> list[Process]:
    """Processes of this user that have `word` among their arguments, this one excepted."""
    return [process for process in map(_identify, _having(word)) if process and alive(process)]


def _having(word: str) -> Iterator[int]:
    wanted = os.fsencode(word)
    for folder in _PROC.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            if folder.stat().st_uid == os.getuid() and wanted in (folder / "cmdline").read_bytes().split(b"\0"):
                yield int(folder.name)


def stop(process: Process, *, grace_s: float = 30.0, kill_s: float = 5.0) -> bool:
    """End a process: TERM to it alone, so that it can end its children in order, then TERM and KILL to its group.

    Args:
        process: one that `start` gave, the leader of its own group.
        grace_s: its time after the first TERM, in seconds.
        kill_s: its group's time after the second, in seconds.

    Returns:
        Whether it is gone; True too when it was already. A process that isn't this very one gets no signal.
    """
    steps = (
        (os.kill, signal.SIGTERM, grace_s),
        (os.killpg, signal.SIGTERM, kill_s),
        (os.killpg, signal.SIGKILL, kill_s),
    )
    for send, number, limit_s in steps:
        # Asked just before each signal: while this process has the number, it and the group's are its own.
        if not alive(process):
            break
        with suppress(ProcessLookupError):
            send(process.pid, number)
        _wait(process, limit_s)
    return state(process) == "gone"


def _wait(process: Process, limit_s: float) -> None:
    deadline, pause_s = time.monotonic() + limit_s, 0.005
    while alive(process) and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)


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
