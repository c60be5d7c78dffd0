"""Whether a process of this machine still runs, and which of several has stopped doing so. Free of torch.

me = Member.here(rank=2)                        written down where the others can read it
me.vital()                                      Vital.RUNS, STOPPED or GONE, for who is on the same machine

watch = Watch(members, silent_s=30.0, clock=time.monotonic)
watch.look()                                    {2: "rank 2 (pid 4711 on n1) has been stopped for 31 s"}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from orchestrator.core.atomic import JsonObject
from orchestrator.core.procfs import boot_id, pid_namespace, process_stat

__all__ = ["Member", "Vital", "Watch"]


class Vital(Enum):
    """How a process is: it runs or waits for something; a signal has stopped it; it has ended."""

    RUNS = "runs"
    STOPPED = "is stopped"
    GONE = "has ended"


_STOPPED = "T"  # "t" is held by a debugger, on purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of the processes that work together.

    Args:
        rank: its number among them.
        pid: process id.
        start: when it started, in clock ticks since boot, so that another one of its number is not taken for it.
        host: its machine's name.
        space: where its number means something: that machine's boot, and the container's own numbers if it has such.
    """

    rank: int
    pid: int
    start: int
    host: str
    space: str

    @classmethod
    def of(cls, rank: int, pid: int) -> Member:
        """The process `pid` of this machine."""
        stat = process_stat(pid)
        return cls(rank=rank, pid=pid, start=stat.start if stat else 0, host=os.uname().nodename, space=_space())

    @classmethod
    def here(cls, rank: int) -> Member:
        """The process that asks."""
        return cls.of(rank, os.getpid())

    @classmethod
    def read(cls, value: JsonObject) -> Member:
        """From `as_json`.

        Raises:
            ValueError: it is nothing of the kind.
        """
        match value:
            case {"rank": int(rank), "pid": int(pid), "start": int(start), "host": str(host), "space": str(space)}:
                return cls(rank=rank, pid=pid, start=start, host=host, space=space)
        raise ValueError(f"not a process: {value}")

    def as_json(self) -> JsonObject:
        """For `read`."""
        return {"rank": self.rank, "pid": self.pid, "start": self.start, "host": self.host, "space": self.space}

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    def is_near(self) -> bool:
        """Whether it is where this process can look at it: on this machine, and not in another container."""
        return self.space == _space()

    def vital(self) -> Vital | None:
        """How it is; None when it is on another machine."""
        if not self.is_near():
            return None
        stat = process_stat(self.pid)
        if stat is None or stat.start != self.start or stat.has_ended:
            return Vital.GONE
        return Vital.STOPPED if stat.state == _STOPPED else Vital.RUNS


def _space() -> str:
    return f"{boot_id()}/{pid_namespace() or os.uname().nodename}"


class Watch:
    """Finds those that have ended, or have been stopped for longer than anyone should wait.

    A process that computes or waits, however long, is none of them: what it waits for has a time limit of its own.

    Args:
        members: those to watch; on this machine.
        silent_s: how long one may be stopped, in seconds; more than a debugger or a suspended job's neighbour needs.
        clock: seconds, monotonic.
    """

    def __init__(self, members: Iterable[Member], *, silent_s: float, clock: Callable[[], float]) -> None:
        self._members = tuple(members)
        self._silent_s = silent_s
        self._clock = clock
        self._stopped: dict[int, float] = {}

    def look(self) -> dict[int, str]:
        """By rank, those that are not to be waited for any more, in words."""
        found = {}
        for member in self._members:
            text = self._judge(member)
            if text is not None:
                found[member.rank] = text
        return found

    def _judge(self, member: Member) -> str | None:
        vital, now = member.vital(), self._clock()
        if vital is Vital.GONE:
            return f"{member} has ended"
        if vital is not Vital.STOPPED:
            self._stopped.pop(member.rank, None)
            return None
        silent_s = now - self._stopped.setdefault(member.rank, now)
        return f"{member} has been stopped for {silent_s:.0f} s" if silent_s >= self._silent_s else None
