"""What a lab can be asked to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import UsageError

__all__ = ["LabOptions"]

_LEAST = {
    "nodes": 1,
    "cpus": 1,
    "grace_time_s": 0,
    "kill_wait_s": 1,
    "cred_expire_s": 5,
    "max_array_size": 1,
    "min_job_age_s": 2,
    "slurmd_timeout_s": 5,
}
_MOST_NODES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LabOptions:
    """A lab's size and its Slurm's habits.

    Args:
        nodes: number of nodes, `n0` to `n<nodes-1>`, each a slurmd on this machine.
        cpus: processors that each node claims to have, whatever the machine has.
        preempt_mode: what happens to a job of partition `low` that a job of `high` displaces; SUSPEND is with GANG.
        grace_time_s: GraceTime of partition `low`, in seconds; SUSPEND has none.
        send_user_signal: a displaced job gets the signal of its `--signal` at once (preempt_send_user_signal).
        kill_wait_s: KillWait, seconds from SIGTERM to SIGKILL.
        cred_expire_s: life of a job credential in seconds; a requeued job may start again after it (usually 120).
        max_array_size: MaxArraySize; the largest array index is one less.
        min_job_age_s: MinJobAge, seconds for which an ended job is remembered.
        slurmd_timeout_s: SlurmdTimeout, seconds of silence after which a node is down and its jobs are NODE_FAIL.
        accounting: run slurmdbd over a private MariaDB, so that `sacct` works.

    Raises:
        UsageError: an option is out of range; the text says which, and what is allowed.
    """

    nodes: int = 4
    cpus: int = 4
    preempt_mode: Literal["REQUEUE", "CANCEL", "SUSPEND"] = "REQUEUE"
    grace_time_s: int = 10
    send_user_signal: bool = False
    kill_wait_s: int = 5
    cred_expire_s: int = 5
    max_array_size: int = 1001
    min_job_age_s: int = 300
    slurmd_timeout_s: int = 60
    accounting: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"lab: {name} is {value}, but must be at least {least}")
        if self.nodes > _MOST_NODES:
            raise UsageError(f"lab: nodes is {self.nodes}, but one machine takes at most {_MOST_NODES}")
        if self.preempt_mode not in ("REQUEUE", "CANCEL", "SUSPEND"):
            raise UsageError(f"lab: preempt_mode is {self.preempt_mode!r}, but must be REQUEUE, CANCEL or SUSPEND")

    @property
    def node_names(self) -> tuple[str, ...]:
        """Names of the nodes, in order."""
        return tuple(f"n{i}" for i in range(self.nodes))
