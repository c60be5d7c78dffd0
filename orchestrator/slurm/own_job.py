"""Our own job in Slurm's eyes: why a notice came, and the requeue that some of them call for.

job = OwnJob(place, token, notice_s=120)
situation, decision = job.judge()
job.requeue()                        judge again before, and after it to see whether it worked
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from orchestrator.core.slurm_env import SlurmPlace
from orchestrator.errors import OrcError, SlurmUnreachable
from orchestrator.slurm import commands
from orchestrator.slurm.notice_policy import Decision, Situation, decide

__all__ = ["OwnJob", "acknowledge", "touch"]

_ASKED = 3
_PATIENCE = commands.Patience(timeout_s=5.0, tries=1)


class OwnJob:
    """The job that this process runs in.

    Args:
        place: the job.
        token: of the submission that it belongs to; its comment or its name must carry it, since Slurm's variables may
            be someone else's, and numbers of jobs come back.
        notice_s: how long before the time limit the notice was asked for, in seconds.
    """

    def __init__(self, place: SlurmPlace, token: str, *, notice_s: float) -> None:
        self._place = place
        self._token = token
        self._notice_s = notice_s

    def judge(self) -> tuple[Situation | None, Decision]:
        """What Slurm says of the job, None without an answer, and what follows from it."""
        situation = self._situation()
        return situation, decide(situation, own_restarts=self._place.restarts, notice_s=self._notice_s)

    def _situation(self) -> Situation | None:
        # The signal that brought us here may have ended the first command that asks, too.
        for _ in range(_ASKED):
            with contextlib.suppress(SlurmUnreachable):
                fields = commands.show_job(self._place.job, patience=_PATIENCE)
                if fields:
                    return Situation.of(fields) if self._is_ours(fields) else None
        return None

    def _is_ours(self, fields: Mapping[str, str]) -> bool:
        return self._token in fields.get("Comment", "") or self._token[:8] in fields.get("JobName", "")

    def requeue(self) -> None:
        """Ask for the requeue; its TERM may kill the scontrol that asks, a second call is refused: both are fine."""
        try:
            commands.requeue(self._place.job, patience=_PATIENCE)
        except OrcError as error:
            print(f"orchestrator: {error}", file=sys.stderr)


def acknowledge() -> None:
    """Tell the batch script that its signal arrived, so that it stops repeating it."""
    touch(os.environ.get("ORC_ACK"))


def touch(path: str | None) -> None:
    """Make an empty file for the batch script; without it the script does a little more than it needs to."""
    if path:
        with contextlib.suppress(OSError):
            Path(path).touch()
