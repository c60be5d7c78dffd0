"""The worker that is one of several ranks: it meets the others, trains one trial with them, and leaves.

A process group is never made twice in a process: what an error of one rank leaves of it can't be undone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from orchestrator.config.program import LoadedJob
from orchestrator.config.spec import SweepSpec
from orchestrator.core.channel import Channel, Send, say, serve
from orchestrator.core.messages import AttemptEnded, Cause, Message, RankDone, RankStarted, RunTrial, Unable
from orchestrator.core.paths import SweepPaths
from orchestrator.distributed.consensus import OutOfStep
from orchestrator.distributed.control_group import PeerLost
from orchestrator.distributed.rendezvous import LOOPBACK, RendezvousFailed, RendezvousRequest, met
from orchestrator.errors import OrcError
from orchestrator.training.checkpoint.concord import RankCheckpointManager
from orchestrator.training.checkpoint.manager import CheckpointManager, Interrupted
from orchestrator.worker.single import TrialWorker, check_devices, loaded

__all__ = ["RankWorker", "server"]

_JOIN_S = 60.0
"""How long to wait for the others at the begin, at least: where nothing is forked each rank imports the job anew."""
_FAR_JOIN_S = 180.0
"""The same on several nodes: a shared file system may show a new file to others after a minute."""
_BY_ALL = (PeerLost, RendezvousFailed, OutOfStep)
"""What tells of other ranks, or of all of them, and not of this one alone."""


class RankWorker(TrialWorker):
    """Trains its part of one trial.

    Args:
        paths: the sweep.
        spec: its spec.
        job: the user's job.
        channel: to the supervisor.
        folder: where the ranks of this supervisor's trials meet.
    """

    def __init__(self, paths: SweepPaths, spec: SweepSpec, job: LoadedJob, channel: Channel, folder: Path) -> None:
        super().__init__(paths, spec, job, channel)
        self._folder = folder

    def serve(self) -> None:
        """Train until the trial has ended."""
        serve(self._channel, self._attempt, self._told, once=True)

    def _done(self, assigned: RunTrial, send: Send) -> Message:
        send(RankStarted(pid=os.getpid()))
        try:
            return self._done_with_others(assigned, send)
        except _BY_ALL as error:
            say(f"{type(error).__name__}: {error}")
            if isinstance(error, RendezvousFailed) and (assigned.host != LOOPBACK or not self._folder.is_dir()):
                return Unable(reason=str(error))  # it is the machines that can't, whatever the trial
            cause = Cause.ERROR if isinstance(error, OutOfStep) else Cause.SIGNAL
            return AttemptEnded(cause=cause, detail=str(error), peer=True)

    def _done_with_others(self, assigned: RunTrial, send: Send) -> Message:
        with met(self._invitation(assigned)) as party:
            self._party = party
            try:
                answer = super()._done(assigned, send)
            except Interrupted as interrupted:
                if not _is_preempted(interrupted.answer):
                    raise
                answer = interrupted.answer  # all leave together
        # Only now is it certain that no rank has failed.
        return answer if party.rank == 0 or isinstance(answer, AttemptEnded) else RankDone()

    def _invitation(self, assigned: RunTrial) -> RendezvousRequest:
        launch, host = self._spec.launch, assigned.host
        return RendezvousRequest(
            folder=self._folder,
            whose=f"trial {assigned.index}, attempt {assigned.attempt}, of {self._paths.id}, by {assigned.writer[:8]}",
            rank=assigned.rank,
            world_size=launch.num_ranks,
            host=host,
            device=_device(assigned.local_rank, assigned.local_size, launch.gpus),
            join_s=max(_JOIN_S if host == LOOPBACK else _FAR_JOIN_S, launch.import_timeout_s),
            answer_s=launch.answer_s,
        )

    def _new_keeper(self, assigned: RunTrial, send: Send) -> CheckpointManager:
        return RankCheckpointManager(
            self._checkpoints(assigned), self._spec.checkpoint, self._party, hears=self._hears, tells=send, say=say
        )

    def _is_asked_to_stop(self) -> bool:
        """Whether all ranks know of a notice: what a job does about it, all must do."""
        return isinstance(self._keeper, RankCheckpointManager) and self._keeper.has_notice


def _is_preempted(answer: Message) -> bool:
    return isinstance(answer, AttemptEnded) and answer.cause is Cause.PREEMPTED


def server(paths: SweepPaths, spec: SweepSpec, folder: Path) -> Callable[[Channel], None]:
    """Import the job; returns what serves one rank's part of one trial in a worker process. Ranks meet in `folder`."""
    job = loaded(paths, spec)
    return lambda channel: RankWorker(paths, spec, job, channel, folder).serve()


def _device(local_rank: int, local_size: int, num_own: int) -> torch.device | None:
    """The GPU of a rank, each its own; None where there are none.

    Args:
        local_rank: its number on this machine.
        local_size: ranks of its trial on this machine.
        num_own: GPUs that it was given for itself, and sees alone; 0 if it chooses among all.

    Raises:
        NoDevices, OrcError: there are fewer than ranks.
    """
    check_devices(num_own)
    if not torch.cuda.is_available():
        return None
    num = torch.cuda.device_count()
    if not num_own and num < local_size:
        raise OrcError(f"{local_size} ranks on one machine need a GPU each, and this one shows {num}")
    found = torch.device("cuda", 0 if num_own else local_rank)
    torch.cuda.set_device(found)
    return found
