"""Why a notice came, and what to do about it: one table.

    Slurm says of the job                          cause              what we do
    RUNNING (SIGNALING, ...), PreemptTime set      preemption         finish what runs, then requeue; Slurm may be first
    RUNNING, no PreemptTime, end near              time limit         finish what can, then requeue
    RUNNING, no PreemptTime, end far               a signal by hand   go on
    anything, Restarts above ours; or PENDING      requeued already   leave
    COMPLETING, Restarts as ours                   cancelled          leave, and never requeue
    no answer, no tool, or of another's job        no reason known    finish what runs, start nothing, ask again

A later notice can only make this stricter, in the order: go on, finish, requeue, leave. So a cancel while a preempted
job finishes takes its requeue back, and just before a requeue Slurm is asked once more. A requeue counts only when
Slurm says so; until then, and while no reason is known, a worker that has finished stays for a while, since a job that
is killed by a preemption is requeued by Slurm, but one that has left is not.

A job that runs, but was restarted more often than we know of, is a later run of ours, on another node: its limits and
its requeues are its own, and we are the late copy that a lost node has kept alive.

Requeueing after a cancel would bring a cancelled job back to life, so in doubt there is none: records decide what is
left to do, and `orc resume` finishes it. Preemption is not left early: on Slurm before 24.05 a job that exits inside
its grace time is not requeued.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.results.records import Cause

__all__ = ["Action", "Decision", "Situation", "decide"]

# A job in CONFIGURING may run already: the word stays until the last node has said that it is ready.
_ALIVE = ("RUNNING", "CONFIGURING", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")
_ENDING = ("COMPLETING", "CANCELLED", "TIMEOUT", "FAILED", "COMPLETED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
_AGAIN = ("PENDING", "REQUEUED", "PREEMPTED")
_EARLY_S = 65
"""Slurm looks every 30 s and may send `--signal` a minute early (sbatch(1)); five more for what happens on the way."""


class Action(enum.StrEnum):
    """What a supervisor does after a notice; a later one replaces an earlier one."""

    GO_ON = "go on"
    FINISH = "finish what runs, start nothing"
    REQUEUE = "finish or stop, then requeue"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What Slurm says of our job at the moment of a notice.

    Args:
        state: the job's state, such as RUNNING.
        preempted: PreemptTime is set.
        restarts: how often it has been requeued.
        left_s: time limit minus run time, both by the controller's clock, in seconds; None without a limit.
    """

    state: str
    preempted: bool
    restarts: int
    left_s: float | None

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> Situation:
        """From the fields of `scontrol show job`."""
        limit, run = seconds(fields.get("TimeLimit", "")), seconds(fields.get("RunTime", ""))
        return cls(
            state=fields.get("JobState", "").partition(" ")[0],
            preempted=fields.get("PreemptTime", "None") not in ("", "None", "N/A", "Unknown"),
            restarts=int(fields.get("Restarts") or 0),
            left_s=None if limit is None or run is None else limit - run,
        )

    def __str__(self) -> str:
        left = "no limit" if self.left_s is None else f"{self.left_s:.0f} s left"
        return f"{self.state}, {'preempted' if self.preempted else 'not preempted'}, restarts {self.restarts}, {left}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Why the notice came, and what follows."""

    cause: Cause
    action: Action

    def replaces(self, before: Decision | None) -> bool:
        """Whether this one, of a later notice, holds instead of `before`; to go on is no decision."""
        order = list(Action)
        return order.index(self.action) > order.index(before.action if before else Action.GO_ON)


def decide(situation: Situation | None, *, own_restarts: int, notice_s: float) -> Decision:
    """The table of this module.

    Args:
        situation: None when Slurm gave no answer.
        own_restarts: SLURM_RESTART_COUNT of this run.
        notice_s: how long before the time limit the notice was asked for, in seconds.
    """
    if situation is None or situation.state not in _ALIVE + _ENDING + _AGAIN:
        return Decision(Cause.NOTICE, Action.FINISH)
    if situation.restarts > own_restarts or situation.state in _AGAIN:
        return Decision(Cause.PREEMPTED, Action.LEAVE)
    if situation.state in _ALIVE:
        return _running(situation, notice_s)
    return Decision(Cause.CANCELLED, Action.LEAVE)


def _running(situation: Situation, notice_s: float) -> Decision:
    if situation.preempted:
        return Decision(Cause.PREEMPTED, Action.REQUEUE)
    if situation.left_s is not None and situation.left_s <= notice_s + _EARLY_S:
        return Decision(Cause.TIMEOUT, Action.REQUEUE)
    return Decision(Cause.SIGNAL, Action.GO_ON)


def seconds(text: str) -> float | None:
    """Slurm's duration `[days-]hours:minutes:seconds` in seconds; None for UNLIMITED and the like."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (dash and not days.isdigit()):
        return None
    total = 0
    for part in parts:
        total = total * 60 + int(part)
    return total + (int(days) * 86400 if dash else 0)
