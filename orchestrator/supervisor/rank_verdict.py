"""The verdict on an attempt that several ranks work on: what they say, and how they end, becomes one message.

    ranks = RankVerdict(4, silent_s=30.0, clock=time.monotonic)
    for message in ranks.hear(rank, message): ...   what the trial has to say now, as one worker would say it
    ranks.exited(rank, status)                      a process has ended
    ranks.check()                                   every second or so; returns the ranks that are to be killed now
    ranks.verdict                                   once all have ended: the message that ends the attempt

Rank 0 speaks for the trial. Workers train it in agreement, and leave at the same place. The programs of a `command:`
come and go by themselves, and their trial is done when all of them are. When a rank dies, the others fail because of
it, within moments and in any order: so all of them are heard, for a few seconds, before one is charged. A rank that is
found stopped ends the others at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

from orchestrator.core.liveness import ProcessState, RankProcess, StallDetector
from orchestrator.core.messages import (
    AttemptEnded,
    Cause,
    Message,
    Outcome,
    RankDone,
    RankMember,
    RankStarted,
    RankStopped,
    Superseded,
    Unable,
)
from orchestrator.core.signals import name_of

__all__ = ["LOOK_S", "RankVerdict", "death"]

LOOK_S = 1.0
"""How often to look at ranks, in seconds."""
_HEARING_S = 3.0
"""How long others may take to say how they fail, once a rank has; they look for the culprit for two seconds."""
_SAVING_S = 600.0
"""The same where a notice has come, and others may be saving."""
_PARTING_S = 10.0
"""How long ranks may take to leave, once the trial has an outcome or their own part in it is done."""


def death(status: int) -> AttemptEnded:
    """Return the message that ends an attempt whose worker has left in the middle of it, with this wait status."""
    if os.WIFSIGNALED(status):
        return AttemptEnded(cause=Cause.SIGNAL, detail=f"killed by {name_of(os.WTERMSIG(status))}")
    code = os.waitstatus_to_exitcode(status)
    detail = f"the worker left with exit code {code} in the middle of the trial"
    return AttemptEnded(cause=Cause.ERROR, detail=detail)


class _Weight(IntEnum):
    """What an ending explains, most first: a death, or a rank that was stopped; what one says of itself; that a program
    goes on later; what one says of others.
    """

    DEATH = 0
    OWN = 1
    LATER = 2
    PEER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """How a rank has failed, or left by agreement, and the message that ends the attempt for it."""

    weight: _Weight
    rank: int
    message: Message


class RankVerdict:
    """Collects what is known of the ranks of one attempt.

    Args:
        num_ranks: how many there are.
        silent_s: how long one may be stopped, in seconds.
        clock: seconds, monotonic.
        in_agreement: whether they are workers, which leave together; else programs, each of which leaves when it likes.
    """

    def __init__(
        self, num_ranks: int, *, silent_s: float, clock: Callable[[], float], in_agreement: bool = True
    ) -> None:
        self._num_ranks = num_ranks
        self._in_agreement = in_agreement
        self._silent_s = silent_s
        self._clock = clock
        self._here = set(range(num_ranks))
        self._finished: set[int] = set()
        self._processes: dict[int, RankProcess] = {}
        self._stalls: StallDetector | None = None
        self._outcome: Message | None = None
        self._endings: list[_Ending] = []
        self._kill_s: float | None = None
        self._is_over = False
        self._looked_s = clock()
        self._watched_s = 0.0

    # What happens

    def hear(self, rank: int, message: Message) -> Iterator[Message]:
        """Take a message of a rank; yield it if the trial says so now."""
        match message:
            case RankStarted(pid=pid):
                self._join(RankProcess.of(rank, pid))
            case RankMember(pid=pid, start=start, host=host, space=space):
                self._join(RankProcess(rank=rank, pid=pid, start=start, host=host, space=space))
            case RankStopped(detail=detail):
                self._stop(rank, detail)
            case AttemptEnded() | Superseded():
                self._finished.add(rank)
                self._end(self._weight(message), rank, _named(rank, message))
            case RankDone() | Outcome():
                self._finish(rank, message)
            case Unable():
                yield message
            case _ if rank == 0:
                yield message
        if not self._in_agreement and len(self._finished) == self._num_ranks:
            self._kill_by(0.0)  # no program is left; a worker stays only for what the others needed of it

    def _finish(self, rank: int, message: Message) -> None:
        self._finished.add(rank)
        if self._in_agreement:
            self._kill_by(_PARTING_S)
        if rank == 0:
            self._outcome = message

    def _weight(self, message: AttemptEnded | Superseded) -> _Weight:
        if isinstance(message, Superseded):
            return _Weight.OWN
        if message.peer:
            return _Weight.PEER
        if self._in_agreement:
            return _Weight.OWN
        return {Cause.SIGNAL: _Weight.DEATH, Cause.PREEMPTED: _Weight.LATER}.get(message.cause, _Weight.OWN)

    def _join(self, process: RankProcess) -> None:
        self._processes[process.rank] = process
        processes = self._processes.values()
        self._stalls = StallDetector(processes, silent_s=self._silent_s, clock=lambda: self._watched_s)

    def _stop(self, rank: int, detail: str) -> None:
        """Count a rank as stopped: nobody waits for it, nor for the others, which do."""
        if rank not in self._finished:
            self._finished.add(rank)
            self._end(_Weight.DEATH, rank, AttemptEnded(cause=Cause.SIGNAL, detail=detail))
            self._kill_s = self._clock()

    def exited(self, rank: int, status: int) -> None:
        """Note that the process of a rank has ended, with this wait status."""
        self._here.discard(rank)
        if rank not in self._finished:
            self._finished.add(rank)
            self._end(_Weight.DEATH, rank, _named(rank, death(status)))

    def _end(self, weight: _Weight, rank: int, message: Message) -> None:
        self._endings.append(_Ending(weight=weight, rank=rank, message=message))
        if weight is not _Weight.LATER:
            is_saving = isinstance(message, AttemptEnded) and message.noticed
            self._kill_by(_SAVING_S if is_saving else _HEARING_S)

    def _kill_by(self, after_s: float) -> None:
        until = self._clock() + after_s
        self._kill_s = until if self._kill_s is None else min(self._kill_s, until)

    # What follows

    def check(self) -> set[int]:
        """Return the ranks that must be killed now: others have failed or are done, or one of them is stopped."""
        now = self._clock()
        # Time in which nobody checked, since all of us were suspended, is not held against anyone.
        self._watched_s += min(now - self._looked_s, 2 * LOOK_S)
        self._looked_s = now
        for rank, reason in self._stopped().items():
            self._stop(rank, reason)
        if self._kill_s is None or now < self._kill_s:
            return set()
        self._is_over = True
        self._finished |= self._here  # they don't die by their own doing
        return set(self._here)

    def _stopped(self) -> dict[int, str]:
        """Return those that were stopped for too long. Of one that has ended its parent is about to tell why."""
        if self._stalls is None:
            return {}
        return {
            rank: reason
            for rank, reason in self._stalls.check().items()
            if rank not in self._finished and self._processes[rank].state() is ProcessState.STOPPED
        }

    @property
    def due_s(self) -> float:
        """In how many seconds to call `check`."""
        next_s = self._looked_s + LOOK_S
        if self._kill_s is not None and not self._is_over:
            next_s = min(next_s, self._kill_s)
        return max(0.0, next_s - self._clock())

    @property
    def verdict(self) -> Message | None:
        """The message that ends the attempt; None while a rank is still here."""
        if self._here:
            return None
        if not self._endings or (self._outcome is not None and self._in_agreement):
            return self._outcome or death(0)
        return min(self._endings, key=self._order).message

    def _order(self, ending: _Ending) -> tuple[int, int]:
        """Of several deaths the first counts, of what ranks say of themselves the lowest rank's, whoever was faster.

        Of programs, which can't tell their own failure from what another's does to them, the first always counts.
        """
        is_by_time = ending.weight is _Weight.DEATH or not self._in_agreement
        return ending.weight, 0 if is_by_time else ending.rank


def _named(rank: int, message: AttemptEnded | Superseded) -> Message:
    """Name the rank in a message that is about it alone."""
    if isinstance(message, Superseded) or message.peer or message.cause is Cause.PREEMPTED:
        return message
    return replace(message, detail=f"rank {rank}: {message.detail}")
