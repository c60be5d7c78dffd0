"""Who the ranks are, and who of them is to blame when they can't go on.

    roll = Membership.call(found, rank, world_size, timeout_s=60.0)       every rank; returns once all are there
    roll.sign(step)                                                 a sign of life, at every step; seldom sent
    raise roll.blame(error) from error                              on a rank whose collective failed
    roll.confess("ValueError: ...")                                 on a rank that fails by its own doing

When one rank dies, the others fail within milliseconds of each other, with errors that name sockets, and some of them
leave before the rest have looked. So each writes down that it only waited for others, and `blame` looks for a while
for the one that didn't.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import orjson
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # not in its stubs

from orchestrator.core.liveness import ProcessState, RankProcess
from orchestrator.distributed.control_group import PeerLost
from orchestrator.errors import OrcError

__all__ = ["Case", "Membership", "RendezvousFailed", "hang_up", "is_of_others", "sockets", "within"]

_SIGN_S = 5.0
_LOOK_S = 0.05
_SHORTEST_PAUSE_S = 0.001
_FAREWELL_S = 0.3
_ANSWER_S = 0.5
_OFF = "off"
_PATIENCE_S = 2.0
"""How long a rank that failed looks for the culprit, and gives the others time to look."""
_LOST = (ProcessState.GONE, ProcessState.STOPPED)
_WORDS = ("gloo/transport", "Connection closed by peer", "Application timeout caused pair closure")
"""What the text of an error has that gloo raises for another rank's sake: they are plain RuntimeErrors."""

T = TypeVar("T")


class RendezvousFailed(OrcError):
    """The ranks did not find each other: some did not come in time, or one that came belongs to something else."""


def is_of_others(error: BaseException) -> bool:
    """Whether an error tells of another rank's trouble, and not of this one's."""
    if isinstance(error, (PeerLost, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@dataclass(slots=True)
class Case:
    """What has been found out so far about ranks that may be to blame.

    Who ends after another is known to have ended does so because of it, so only the first to be found count.

    Args:
        open: those that nothing is known of.
        charges: who is to blame, for what.
    """

    open: dict[int, RankProcess]
    charges: dict[int, str] = field(default_factory=dict)

    def hear(self, member: RankProcess, said: str | None) -> None:
        """It has said that it waited for others, or what else it failed by; or nothing."""
        if said is not None:
            del self.open[member.rank]
        if said:
            self.charges[member.rank] = f"{member} failed: {said}"

    def see(self) -> dict[int, ProcessState]:
        """How those are that are still open and don't run any more."""
        found = ((rank, member.state()) for rank, member in self.open.items())
        return {rank: vital for rank, vital in found if vital is not None and vital in _LOST}

    def close(self, ended: Mapping[int, ProcessState]) -> None:
        """Of these nothing more will be heard."""
        silent = {rank: vital for rank, vital in ended.items() if rank in self.open}
        if not self.charges:
            self.charges = {rank: f"{self.open[rank]} {vital.value}" for rank, vital in silent.items()}
        for rank in silent:
            del self.open[rank]


class Membership:
    """The ranks that met, as one of them sees them.

    Args:
        found: the store, over a connection that nobody else uses.
        rank: of this process.
        members: all of them, by rank.
    """

    def __init__(self, found: Store, rank: int, members: Sequence[RankProcess]) -> None:
        self._store = found
        self._rank = rank
        self.members = tuple(members)
        self._lines: Mapping[int, str] = {}
        self._next_sign = 0.0

    def holds(self, lines: Mapping[int, str]) -> None:
        """Note the connections to the other ranks, as `sockets` gives them."""
        self._lines = dict(lines)

    @classmethod
    def call(cls, found: Store, rank: int, world_size: int, *, timeout_s: float) -> Membership:
        """Say that this rank is here, and wait for the others.

        Raises:
            RendezvousFailed: some did not come in time, or there are two of this rank; says which.
        """
        me = RankProcess.here(rank)
        if found.add(f"seat/{rank}", 1) > 1:
            raise RendezvousFailed(
                f"{me}: another process has come as rank {rank} already: is this one started twice, or another job's?"
            )
        found.set(_here(rank), orjson.dumps(me.to_json()).decode())
        try:
            _await_all(found, world_size, timeout_s)
        except RendezvousFailed as error:
            if rank == 0:
                time.sleep(_FAREWELL_S)  # the store is this rank's; let the others read why it goes
            raise RendezvousFailed(f"{me}: {error}") from None
        texts = found.multi_get([_here(other) for other in range(world_size)])
        return cls(found, rank, [RankProcess.from_json(orjson.loads(text)) for text in texts])

    def __str__(self) -> str:
        return ", ".join(map(str, self.members))

    def sign(self, step: int) -> None:
        """A sign of life, for those that may have to say where this rank was last seen. Costs a look at the clock."""
        now = time.monotonic()
        if now >= self._next_sign:
            self._next_sign = now + _SIGN_S
            self._store.set(f"sign/{self._rank}", f"step {step}, at {time.strftime('%H:%M:%S')}")

    def confess(self, text: str) -> None:
        """Say that this rank fails by its own doing, so that the others name it and its cause."""
        self._say(text.partition("\n")[0] or "for no reason given")

    def _say(self, text: str) -> None:
        _told(lambda: self._store.set(f"said/{self._rank}", text))

    def blame(self, error: BaseException, *, patience_s: float = _PATIENCE_S) -> PeerLost:
        """Who is to blame for an error that came from another rank's end or silence.

        Takes up to `patience_s` seconds. Whoever still waits for this rank in a collective fails at once, and all look
        while all are there.
        """
        self._say("")
        hang_up(self._lines)
        case = Case({member.rank: member for member in self.members if member.rank != self._rank})
        began = time.monotonic()
        self._look(case)
        # Without the store there is nothing more to hear, and the others are no better off.
        while case.open and time.monotonic() < began + (_FAREWELL_S if self._is_mute() else patience_s):
            time.sleep(_LOOK_S)
            self._look(case)
        charges = [*case.charges.values()] or [self._silent(member) for member in case.open.values()]
        if self._rank == 0:
            time.sleep(_FAREWELL_S)  # the store is this rank's, and others may still be asking
        reason = str(error).partition("\n")[0]
        return PeerLost(f"{'; '.join(charges) or 'no rank is known to be lost'} (rank {self._rank} saw: {reason})")

    def _look(self, case: Case) -> None:
        ended = case.see()  # before they are asked: a rank may say that it waited, and leave, between the two
        for member in list(case.open.values()):
            case.hear(member, self._read(f"said/{member.rank}"))
        case.close(ended)

    def _read(self, key: str) -> str | None:
        return (
            None
            if self._is_mute()
            else _told(lambda: self._store.get(key).decode() if self._store.check([key]) else None)
        )

    def _is_mute(self) -> bool:
        """Whether the store won't answer, since rank 0, whose it is, is lost."""
        return self._rank != 0 and self.members[0].state() in _LOST

    def _silent(self, member: RankProcess) -> str:
        last = self._read(f"sign/{member.rank}")
        seen = f"its last sign was {last}" if last else "it has given no sign"
        return f"{member} has not come to where the others wait; {seen}"


def _here(rank: int) -> str:
    return f"here/{rank}"


def _await_all(found: Store, world_size: int, timeout_s: float) -> None:
    """Return once all ranks are here. The first whose patience ends calls it off for all, so that all say the same."""
    keys = [_here(rank) for rank in range(world_size)]
    until, pause_s = time.monotonic() + timeout_s, _SHORTEST_PAUSE_S
    while not found.check(keys):
        if time.monotonic() >= until:
            missing = [str(rank) for rank, key in enumerate(keys) if not found.check([key])]
            found.set(
                _OFF, f"of {world_size} ranks, not all came within {timeout_s:g} s; missing: {', '.join(missing)}"
            )
        if found.check([_OFF]):
            raise RendezvousFailed(found.get(_OFF).decode())
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_S)


def sockets() -> dict[int, str]:
    """The sockets of this process: by file descriptor, the name that the kernel gives to each."""
    return {int(link.name): str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_socket()}


def hang_up(lines: Mapping[int, str]) -> None:
    """Shut connections down, for both ends to see: gloo can't be asked to give up what it waits for."""
    now = sockets()
    for number, name in lines.items():
        if now.get(number) == name:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as line:
                if not line.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # gloo aborts if it can't listen
                    line.shutdown(socket.SHUT_RDWR)


def within(limit_s: float, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises, if it does so in time: a store whose keeper is stopped never answers, whatever the
    limit that it was given.

    Raises:
        TimeoutError: it takes longer; its thread is left to itself.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(ask())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(limit_s)


def _told(ask: Callable[[], T]) -> T | None:
    """What a store says, or None where it says nothing."""
    with contextlib.suppress(dist.DistError, RuntimeError, TimeoutError):
        return within(_ANSWER_S, ask)
    return None
