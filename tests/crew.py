"""Ranks as real processes, forked from one parent that has imported torch: a few milliseconds each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from orchestrator.distributed.rendezvous import RankContext, RendezvousRequest, met
from orchestrator.errors import OrcError

LIMIT_S = 60.0
"""Longest that a test waits for a rank; a machine that is busy needs seconds for what takes milliseconds."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch._dynamo", "orchestrator.training.data_parallel", "orchestrator.distributed.consensus", "pytest"]
)


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank that was started."""

    process: Any
    ours: Connection

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def hears(self) -> Any:
        """What it has said next."""
        assert self.ours.poll(LIMIT_S), "it still says nothing"
        return self.ours.recv()

    def end(self) -> Any:
        """What it came to: what its function returned, or the text of its error; its wait status if it says nothing."""
        try:
            return self.hears()
        except EOFError:
            self.process.join(LIMIT_S)
            return self.process.exitcode


def call(folder: Path, rank: int, world_size: int, **options: Any) -> RendezvousRequest:
    """To meet on this machine."""
    whose = options.pop("whose", "trial 3, attempt 0, of small-1a2b")
    return RendezvousRequest(folder=folder, whose=whose, rank=rank, world_size=world_size, **options)


def _run(theirs: Connection, invitation: RendezvousRequest, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        with met(invitation) as party:
            found = work(party, *args)
    except OrcError as error:
        found = f"{type(error).__name__}: {error}"
    except Exception as error:
        found = f"{type(error).__name__}: {error}" if isinstance(error, ZeroDivisionError) else traceback.format_exc()
    theirs.send(found)
    theirs.close()
    os._exit(0)  # as a worker does; what is left of the group goes with it


def _run_saying(
    theirs: Connection, invitation: RendezvousRequest, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    _run(theirs, invitation, work, (theirs.send, *args))


@contextmanager
def crew(
    invitations: list[RendezvousRequest], work: Callable[..., Any], *args: Any, saying: bool = False
) -> Iterator[list[Rank]]:
    """A rank for each invitation, at `work(party, *args)`, or `work(party, say, *args)`; killed at the block's end."""
    ranks = []
    for invitation in invitations:
        ours, theirs = _context.Pipe()
        target = _run_saying if saying else _run
        process = _context.Process(target=target, args=(theirs, invitation, work, args), daemon=True)
        process.start()
        theirs.close()
        ranks.append(Rank(process, ours))
    try:
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                if rank.process.is_alive():
                    rank.signal(signal.SIGKILL)
            rank.process.join(LIMIT_S)
            rank.ours.close()


def together(
    folder: Path, world_size: int, work: Callable[[RankContext], Any] | Callable[..., Any], *args: Any
) -> list[Any]:
    """What each rank's `work(party, *args)` returned, or the text of its error."""
    with crew([call(folder, rank, world_size) for rank in range(world_size)], work, *args) as ranks:
        return [rank.end() for rank in ranks]
