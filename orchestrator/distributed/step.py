"""How the processes of one job step meet: Slurm's variables say who they are, `distributed.rendezvous` does the rest.

seat = StepTask.of(os.environ)
with joined(paths, seat, timeout_s=60.0) as group: ...
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from orchestrator.core.paths import SweepPaths
from orchestrator.core.slurm_env import StepTask
from orchestrator.distributed.control_group import ControlGroup
from orchestrator.distributed.rendezvous import LOOPBACK, RendezvousFailed, RendezvousRequest, met
from orchestrator.errors import OrcError

__all__ = ["joined"]


@contextlib.contextmanager
def joined(paths: SweepPaths, seat: StepTask, *, timeout_s: float) -> Iterator[ControlGroup]:
    """The group of all ranks of the step, on gloo; every rank must call it.

    Args:
        paths: the sweep, in whose folder they meet.
        seat: of this process.
        timeout_s: how long to wait for the others, here and in every operation of the group, in seconds.

    Raises:
        OrcError: they did not meet in time, or a process of another job is among them; later, a rank is gone or silent.
    """
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(_met(paths, seat, timeout_s))
        except RendezvousFailed as error:
            raise OrcError(
                f"rank {seat.rank} of {seat.world_size}: the ranks did not meet within {timeout_s:g} s: {error}"
            ) from error
        yield group


@contextlib.contextmanager
def _met(paths: SweepPaths, seat: StepTask, timeout_s: float) -> Iterator[ControlGroup]:
    folder = paths.rendezvous(seat.name)
    call = RendezvousRequest(
        folder=folder,
        whose=f"step {seat.name} of {paths.id}",
        rank=seat.rank,
        world_size=seat.world_size,
        host=LOOPBACK if seat.num_nodes == 1 else socket.gethostname(),
        join_s=timeout_s,
        answer_s=timeout_s,
    )
    if seat.world_size > 1:
        with contextlib.suppress(OSError):  # `met` says what is wrong with it
            folder.mkdir(mode=0o700, exist_ok=True)
    try:
        with met(call) as party:
            _leave(folder)
            yield party.group
    finally:
        _leave(folder)


def _leave(folder: Path) -> None:
    """Remove it, unless rank 0's file is still there for those who come."""
    with contextlib.suppress(OSError):
        folder.rmdir()
