"""The processes that a trial has started, however they were detached, and how all of them are ended.

    adopt_orphans()                     in supervisor, forkserver and worker: what loses its parent becomes our child
    die_with_parent(pid)                in a new process: the kernel kills it when its parent ends
    end_descendants(keep=..., since=...)    kill everything below this process, and name it
    end_left(tokens)                    the same for what a supervisor that was killed has left on this machine

Three layers hold together, so that it doesn't matter which process dies first:

1. A supervisor, its forkserver and each worker are child subreapers (PR_SET_CHILD_SUBREAPER, prctl(2)). A process that
   forks twice, starts a session of its own or closes every descriptor stays below them, and is found by its parent.
   When a worker dies its orphans go to the forkserver; when that dies, to the supervisor. Each ends what it inherits.
2. The kernel kills a worker, and the program that it runs, when the parent of that process dies (PR_SET_PDEATHSIG).
3. The environment of everything that a supervisor starts names it (`MARK`). So a later command finds what is left when
   supervisor and forkserver were killed together.

A signal goes to a process through a descriptor (pidfd_open(2)) after its start time was compared, so a process that got
the number of another one is never hit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from orchestrator.identity import ProcessStat, boot_id, process_stat

__all__ = [
    "MARK",
    "adopt_orphans",
    "children",
    "die_with_parent",
    "end_descendants",
    "end_left",
    "has_children",
    "left",
    "live_without_parent",
    "mark",
    "named",
    "reap_others",
    "start_time",
]

MARK = "ORC_SUPERVISOR"
"""The variable that names the supervisor of a process; see `mark`."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PROC = Path("/proc")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_SHOWN_CHARACTERS = 60


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own, and of no one else's."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, its parent, ends. A program that it executes keeps that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def live_without_parent() -> None:
    """Undo `die_with_parent`: a process that sees the end of its channel can clean up first."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)


# Looking


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since the boot; 0 when there is none of that number."""
    entry = process_stat(pid)
    return 0 if entry is None else entry.start


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir(_PROC) if name.isdigit())  # noqa: PTH208 (a tenth of the time)


def has_children() -> bool:
    """Whether this process has a child, alive or waiting to be reaped. One system call."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children() -> frozenset[int]:
    """The children of this process."""
    me = os.getpid()
    return frozenset(entry.pid for pid in _pids() if (entry := process_stat(pid)) and entry.parent == me)


def _below(top: int, *, keep: Collection[int], since: int) -> list[ProcessStat]:
    """Return every process below `top`, but for children in `keep` or older than `since`, and all below those."""
    by_parent: dict[int, list[ProcessStat]] = {}
    for pid in _pids():
        if (entry := process_stat(pid)) is not None:
            by_parent.setdefault(entry.parent, []).append(entry)
    waiting = [entry for entry in by_parent.get(top, []) if entry.pid not in keep and entry.start >= since]
    reached: list[ProcessStat] = []
    while waiting:
        entry = waiting.pop()
        reached.append(entry)
        waiting += by_parent.get(entry.pid, [])
    return reached


def named(entry: ProcessStat) -> str:
    """A process in words: its number and the begin of its command line."""
    try:
        line = (_PROC / str(entry.pid) / "cmdline").read_bytes()
    except OSError:
        line = b""
    words = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return f"{entry.pid} {words[:_SHOWN_CHARACTERS]}".strip()


# Ending


def _send(entry: ProcessStat, number: int) -> None:
    """Send a signal to this very process; one that has ended, or belongs to someone else, is left alone."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(entry.pid)
        try:
            if start_time(entry.pid) == entry.start:
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def reap_others(keep: Collection[int] = ()) -> None:
    """Take the exit statuses of adopted children that have ended; stop at one in `keep`, which its owner waits for."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in keep:
            os.waitpid(ended.si_pid, 0)


def end_descendants(
    *, keep: Collection[int] = (), since: int = 0, grace_s: float = 0.0, limit_s: float = 5.0
) -> list[str]:
    """Kill every process below this one, and wait until they are gone.

    It looks again until nothing is left, so what is forked meanwhile is found as well.

    Args:
        keep: children that stay, with all that is below them.
        since: children that started before, in clock ticks since the boot, stay too.
        grace_s: send TERM first, and wait so long before KILL, in seconds.
        limit_s: stop waiting after so many seconds: a process that the kernel can't interrupt outlives its KILL.

    Returns:
        Every process that was alive, in words.
    """
    if not has_children():
        return []
    me, began, pause_s = os.getpid(), time.monotonic(), _FIRST_PAUSE_S
    told: dict[tuple[int, int], str] = {}
    while below := _below(me, keep=keep, since=since):
        waited_s = time.monotonic() - began
        for entry in below:
            if entry.has_ended:
                _reap(entry, me)
                continue
            is_new = (entry.pid, entry.start) not in told
            if is_new:
                told[entry.pid, entry.start] = named(entry)
            if waited_s >= grace_s:
                _send(entry, signal.SIGKILL)
            elif is_new:
                _send(entry, signal.SIGTERM)
        if waited_s >= grace_s + limit_s:
            break
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return list(told.values())


def _reap(entry: ProcessStat, me: int) -> None:
    if entry.parent == me:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(entry.pid, os.WNOHANG)


# What killed supervisors have left


def mark(token: str, environment: Mapping[str, str]) -> str:
    """The value of `MARK` for what this process, a supervisor of the submission `token`, starts.

    It holds the submission, this process, where its number means something, and the Slurm job. A job that a trial
    submits inherits the variable but has another job id, so it is not taken for something of ours.
    """
    me = os.getpid()
    return ":".join((token, str(me), str(start_time(me)), _place(), environment.get("SLURM_JOB_ID", "")))


def _place() -> str:
    """The boot and the namespace in which a process number means something."""
    try:
        namespace = str((_PROC / "self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return f"{boot_id()}/{''.join(filter(str.isdigit, namespace))}"


def left(tokens: Collection[str]) -> list[ProcessStat]:
    """Processes of this user whose supervisor, one of the submissions `tokens`, no longer runs on this machine."""
    if not tokens:
        return []
    place, mine = _place(), _ancestors()
    entries = (
        entry for pid in _pids() if pid not in mine and _is_left(pid, tokens, place) and (entry := process_stat(pid))
    )
    return [entry for entry in entries if not entry.has_ended]


def _ancestors() -> set[int]:
    """Return the numbers of the calling process and of all above it."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        entry = process_stat(pid)
        pid = entry.parent if entry else 0
    return found


def _is_left(pid: int, tokens: Collection[str], place: str) -> bool:
    folder = _PROC / str(pid)
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        content = (folder / "environ").read_bytes()
    except OSError:
        return False
    wanted = f"{MARK}=".encode()
    if wanted not in content:
        return False
    variables = dict(one.partition(b"=")[::2] for one in content.split(b"\0"))
    value = variables.get(MARK.encode(), b"").decode("ascii", "replace")
    job = variables.get(b"SLURM_JOB_ID", b"").decode("ascii", "replace")
    match value.split(":"):
        case [token, number, start, where, of_job] if number.isdigit() and start.isdigit():
            is_ours = token in tokens and where == place and of_job == job
            return is_ours and not _runs(int(number), int(start))
    return False


def _runs(pid: int, start: int) -> bool:
    entry = process_stat(pid)
    return entry is not None and entry.start == start and not entry.has_ended


def end_left(tokens: Iterable[str], *, grace_s: float = 2.0, limit_s: float = 5.0) -> tuple[list[str], list[str]]:
    """End what `left` finds; what is about to end by itself is given time for it.

    Args:
        tokens: of submissions to this machine.
        grace_s: how long to wait before KILL, in seconds: a forkserver whose supervisor was killed cleans up itself.
        limit_s: how long to wait after KILL, in seconds.

    Returns:
        What was killed and is gone, and what is still there, in words.
    """
    wanted, began, pause_s = frozenset(tokens), time.monotonic(), _FIRST_PAUSE_S
    killed: dict[tuple[int, int], str] = {}
    while found := left(wanted):
        waited_s = time.monotonic() - began
        if waited_s >= grace_s:
            for entry in found:
                killed.setdefault((entry.pid, entry.start), named(entry))
                _send(entry, signal.SIGKILL)
        if waited_s >= grace_s + limit_s:
            break
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    remaining = {(entry.pid, entry.start) for entry in found}
    return (
        [text for key, text in killed.items() if key not in remaining],
        [text for key, text in killed.items() if key in remaining],
    )
