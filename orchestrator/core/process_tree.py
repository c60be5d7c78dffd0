"""The processes that a trial has started, however they were detached, and how all of them are ended.

    adopt_orphans()                     what loses its parent below this process becomes its child
    die_with_parent(pid)                in a new process: the kernel kills it when its parent ends
    end_descendants(keep=..., since=...)    end everything below this process, and tell what that was
    end_left(tokens)                    the same for what a supervisor that was killed has left on this machine

Three layers hold together, so that it doesn't matter which process dies first:

1. A supervisor is a child subreaper (PR_SET_CHILD_SUBREAPER, prctl(2)), and so is the guardian above its forkserver and
   above each worker (`core.guardian`), and the forkserver. A process that forks twice, starts a session of its
   own or closes every descriptor stays below them, and is found by its parent. Each ends what it inherits.
2. The kernel kills a worker, and the program that it runs, when the parent of that process dies (PR_SET_PDEATHSIG).
3. The environment of everything that a supervisor starts names it (`MARK`). So a later command finds what is left when
   supervisor, guardians and forkserver were killed together.

A signal goes to a process through a descriptor (pidfd_open(2)) after its start time was compared, so a process that got
the number of another one is never hit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from orchestrator.core.procfs import ProcessStat, boot_id, pid_namespace, process_stat

__all__ = [
    "MARK",
    "Ended",
    "adopt_orphans",
    "children",
    "children_now",
    "die_with_parent",
    "end_descendants",
    "end_left",
    "has_children",
    "left",
    "mark",
    "named",
    "runs",
    "start_time",
    "supervisor_of",
]

MARK = "ORC_SUPERVISOR"
"""The variable that names the supervisor of a process; see `mark`."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_SHOWN_CHARACTERS = 60
_MOST_READS = 10


def _prctl(what: int, value: int) -> None:
    import ctypes  # here, since commands that only look have no use for it

    ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own, and of no one else's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, its parent, ends. A program that it executes keeps that."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# Looking


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since the boot; 0 when there is none of that number."""
    entry = process_stat(pid)
    return 0 if entry is None else entry.start


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 (a tenth of the time)


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


def children_now() -> frozenset[int] | None:
    """Return the children of this process, which has one thread, by the kernel's own list; None where it keeps none.

    It costs one file and not a look at every process of the machine. A list that is read while a child ends may lack
    others (proc(5)), so it counts once it was read twice alike.
    """
    before = None
    for _ in range(_MOST_READS):
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:  # noqa: PTH123 (pathlib is slow to import)
                pids = frozenset(map(int, file.read().split()))
        except OSError:
            return None
        if pids == before:
            return pids
        before = pids
    return None


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
    """Return a process in words, in one line: its number and the begin of its command line."""
    words = _read(entry.pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")
    printable = "".join(character if character.isprintable() else " " for character in words)
    return f"{entry.pid} {' '.join(printable.split())[:_SHOWN_CHARACTERS]}".strip()


def _read(pid: int, what: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{what}", "rb") as file:  # noqa: PTH123 (pathlib is slow to import)
            return file.read()
    except OSError:
        return b""


# Ending


class Ended(NamedTuple):
    """What was ended, in words, a process each.

    Args:
        gone: no longer there; of those that had to be killed the words say so.
        remaining: still there, although killed.
        unkillable: (pid, start time) of those.
    """

    gone: list[str]
    remaining: list[str]
    unkillable: frozenset[tuple[int, int]] = frozenset()


def end_descendants(
    *,
    keep: Collection[int] = (),
    since: int = 0,
    ignore: Collection[tuple[int, int]] = (),
    grace_s: float = 0.0,
    limit_s: float = 5.0,
) -> Ended:
    """End every process below this one, and wait until they are gone.

    It looks again until nothing is left, so what is forked meanwhile is found as well.

    Args:
        keep: children that stay, with all that is below them.
        since: children that started before, in clock ticks since the boot, stay too.
        ignore: (pid, start time) of processes not to wait for: they outlived an earlier KILL.
        grace_s: send TERM first, and wait so long before KILL, in seconds.
        limit_s: stop waiting so many seconds after KILL: a process that the kernel can't interrupt outlives it.
    """
    if not has_children():
        return Ended([], [])
    me, began = os.getpid(), time.monotonic()

    def look() -> list[ProcessStat]:
        below = [entry for entry in _below(me, keep=keep, since=since) if (entry.pid, entry.start) not in ignore]
        ended = [entry for entry in below if entry.has_ended]
        for entry in ended:
            if entry.parent == me:
                if time.monotonic() - began >= grace_s:  # others of its group have had their time by then
                    _end_group_of(entry)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(entry.pid, os.WNOHANG)
        return below

    return _end(look, first=(signal.SIGTERM, signal.SIGCONT), grace_s=grace_s, limit_s=limit_s)


def _end_group_of(entry: ProcessStat) -> None:
    """Kill the group of a child that has ended and waits to be reaped: nobody else can have its number until then.

    So those end that fork and leave faster than anyone can look: a signal to a group reaches all of it at once.
    """
    if entry.group > 1 and entry.group != os.getpgrp():
        with contextlib.suppress(OSError):
            os.killpg(entry.group, signal.SIGKILL)


def _end(look: Callable[[], list[ProcessStat]], *, first: tuple[int, ...], grace_s: float, limit_s: float) -> Ended:
    """Send `first`, and KILL after a grace, to what `look` finds, until it finds nothing or the time is over."""
    began, pause_s = time.monotonic(), _FIRST_PAUSE_S
    there_at_first: set[tuple[int, int]] | None = None
    words: dict[tuple[int, int], str] = {}
    killed: set[tuple[int, int]] = set()
    while below := look():
        waited_s = time.monotonic() - began
        alive = {(entry.pid, entry.start): entry for entry in below if not entry.has_ended}
        there_at_first = set(alive) if there_at_first is None else there_at_first
        for key, entry in alive.items():
            if waited_s >= grace_s:
                words.setdefault(key, named(entry))
                killed.add(key)
                _send(entry, signal.SIGKILL)
            elif key not in words:
                words[key] = named(entry)
                _send(entry, *first)
        if waited_s >= grace_s + limit_s:
            break
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    remaining = {(entry.pid, entry.start) for entry in below if not entry.has_ended}
    # What came while they were being ended, and went, was never left running; what got no signal ended by itself.
    # The stubborn ones come first.
    told = sorted(killed) + sorted(key for key in words.keys() - killed if first and key in (there_at_first or ()))
    late = f" (killed: it did not end within {grace_s:g} s of SIGTERM)" if first and grace_s else ""
    return Ended(
        [words[key] + late * (key in killed) for key in told if key not in remaining],
        [words[key] for key in told if key in remaining],
        frozenset(remaining & killed),
    )


def _send(entry: ProcessStat, *numbers: int) -> None:
    """Send signals to this very process; one that has ended, or belongs to someone else, is left alone."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(entry.pid)
        try:
            if start_time(entry.pid) == entry.start:
                for number in numbers:
                    signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


# What killed supervisors have left


def mark(token: str, environment: Mapping[str, str]) -> str:
    """The value of `MARK` for what this process, a supervisor of the submission `token`, starts.

    It holds the submission, this process, where its number means something, and the Slurm job. A job that a trial
    submits inherits the variable but has another job id, so it is not taken for something of ours.

    Args:
        token: of the submission.
        environment: that of what is started.
    """
    me = os.getpid()
    return ":".join((token, str(me), str(start_time(me)), _place(), environment.get("SLURM_JOB_ID", "")))


def _place() -> str:
    """The boot and the namespace in which a process number means something."""
    return f"{boot_id()}/{pid_namespace()}"


class _Mark(NamedTuple):
    token: str
    pid: int
    start: int
    place: str
    job: str

    @classmethod
    def of(cls, value: str) -> _Mark | None:
        match value.split(":"):
            case [token, pid, start, place, job] if pid.isdigit() and start.isdigit():
                return cls(token, int(pid), int(start), place, job)
        return None


def supervisor_of(environment: Mapping[str, str]) -> int | None:
    """The supervisor, alive on this machine, below which whoever has this environment runs; None without one."""
    found = _Mark.of(environment.get(MARK, ""))
    is_here = found is not None and found.place == _place() and found.job == environment.get("SLURM_JOB_ID", "")
    return found.pid if found is not None and is_here and runs(found.pid, found.start) else None


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
    seen: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in seen:
        seen.add(pid)
        entry = process_stat(pid)
        pid = entry.parent if entry else 0
    return seen


def _is_left(pid: int, tokens: Collection[str], place: str) -> bool:
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():  # noqa: PTH116 (pathlib is slow to import)
            return False
    except OSError:
        return False
    content = _environment_of(pid)
    if f"{MARK}=".encode() not in content:
        return False
    variables = dict(variable.partition(b"=")[::2] for variable in content.split(b"\0"))
    supervisor = _Mark.of(variables.get(MARK.encode(), b"").decode("ascii", "replace"))
    job = variables.get(b"SLURM_JOB_ID", b"").decode("ascii", "replace")
    return (
        supervisor is not None
        and supervisor.token in tokens
        and (supervisor.place, supervisor.job) == (place, job)
        and not runs(supervisor.pid, supervisor.start)
    )


def _environment_of(pid: int) -> bytes:
    """Return the environment of a process as it was at its start; also of one whose first thread has ended."""
    if content := _read(pid, "environ"):
        return content
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 (a tenth of the time)
    except OSError:
        return b""
    return next((content for thread in threads if (content := _read(pid, f"task/{thread}/environ"))), b"")


def runs(pid: int, start: int) -> bool:
    """Whether the process of this number that started then, in clock ticks since the boot, has not ended."""
    entry = process_stat(pid)
    return entry is not None and entry.start == start and not entry.has_ended


def end_left(tokens: Iterable[str], *, grace_s: float = 2.0, limit_s: float = 5.0) -> Ended:
    """End what `left` finds; what is about to end by itself is given time for it.

    Args:
        tokens: of submissions to this machine.
        grace_s: how long to wait before KILL, in seconds: a guardian whose supervisor was killed cleans up itself.
        limit_s: how long to wait after KILL, in seconds.
    """
    wanted = frozenset(tokens)
    return _end(lambda: left(wanted), first=(), grace_s=grace_s, limit_s=limit_s)
