"""Which of the processes that train together still run, and which have ended or been stopped. Free of torch.

process = RankProcess.here(rank=2)              written down where the others can read it
process.state()                                 ProcessState.RUNS, STOPPED or GONE; None on another machine

detector = StallDetector(processes, silent_s=30.0, clock=time.monotonic)
detector.check()                                {2: "rank 2 (pid 4711 on n1) has been stopped for 31 s"}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from orchestrator.core.atomic import JsonObject
from orchestrator.core.procfs import boot_id, pid_namespace, process_stat

__all__ = ["ProcessState", "RankProcess", "StallDetector"]


class ProcessState(Enum):
    """How a process is: it runs or waits for something; a signal has stopped it; it has ended."""

    RUNS = "runs"
    STOPPED = "is stopped"
    GONE = "has ended"


_STOPPED = "T"  # "t" is held by a debugger, on purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class RankProcess:
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
    def of(cls, rank: int, pid: int) -> RankProcess:
        """Return the process `pid` of this machine."""
        stat = process_stat(pid)
        return cls(rank=rank, pid=pid, start=stat.start if stat else 0, host=os.uname().nodename, space=_space())

    @classmethod
    def here(cls, rank: int) -> RankProcess:
        """Return this process."""
        return cls.of(rank, os.getpid())

    @classmethod
    def from_json(cls, value: JsonObject) -> RankProcess:
        """Read what `to_json` has returned.

        Raises:
            ValueError: it is nothing of the kind.
        """
        match value:
            case {"rank": int(rank), "pid": int(pid), "start": int(start), "host": str(host), "space": str(space)}:
                return cls(rank=rank, pid=pid, start=start, host=host, space=space)
        raise ValueError(f"not a process: {value}")

    def to_json(self) -> JsonObject:
        """Return it as a JSON object."""
        return {"rank": self.rank, "pid": self.pid, "start": self.start, "host": self.host, "space": self.space}

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    def is_near(self) -> bool:
        """Return whether it is where this process can look at it: on this machine, and not in another container."""
        return self.space == _space()

    def state(self) -> ProcessState | None:
        """Return how it is; None when it is on another machine."""
        if not self.is_near():
            return None
        stat = process_stat(self.pid)
        if stat is None or stat.start != self.start or stat.has_ended:
            return ProcessState.GONE
        return ProcessState.STOPPED if stat.state == _STOPPED else ProcessState.RUNS


def _space() -> str:
    return f"{boot_id()}/{pid_namespace() or os.uname().nodename}"


class StallDetector:
    """Finds processes that have ended, or have been stopped for longer than anyone should wait.

    A process that computes or waits, however long, is none of them: what it waits for has a time limit of its own.

    Args:
        processes: those to watch; on this machine.
        silent_s: how long one may be stopped, in seconds; more than a debugger or a suspended job's neighbour needs.
        clock: seconds, monotonic.
    """

    def __init__(self, processes: Iterable[RankProcess], *, silent_s: float, clock: Callable[[], float]) -> None:
        self._processes = tuple(processes)
        self._silent_s = silent_s
        self._clock = clock
        self._stopped_since: dict[int, float] = {}

    def check(self) -> dict[int, str]:
        """Return, by rank, why some are not to be waited for any more."""
        reasons = ((process.rank, self._reason(process)) for process in self._processes)
        return {rank: reason for rank, reason in reasons if reason is not None}

    def _reason(self, process: RankProcess) -> str | None:
        state, now = process.state(), self._clock()
        if state is ProcessState.GONE:
            return f"{process} has ended"
        if state is not ProcessState.STOPPED:
            self._stopped_since.pop(process.rank, None)
            return None
        silent_s = now - self._stopped_since.setdefault(process.rank, now)
        return f"{process} has been stopped for {silent_s:.0f} s" if silent_s >= self._silent_s else None
