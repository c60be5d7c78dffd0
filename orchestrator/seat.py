"""Which of the processes of a job step this one is, by Slurm's variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ALONE", "LOOPBACK", "Seat"]

LOOPBACK = "127.0.0.1"
"""Where all processes are that meet on one machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A process among those of its job step.

    Args:
        rank: its number, from 0.
        world_size: how many there are.
        num_nodes: machines that they run on.
        name: of this run of the step; no other has it.
    """

    rank: int
    world_size: int
    num_nodes: int
    name: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Seat:
        """From Slurm's variables; outside of a job step, one alone."""
        if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
            return ALONE
        names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
        return cls(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            num_nodes=int(environment["SLURM_STEP_NUM_NODES"]),
            name="-".join(environment.get(name) or "0" for name in names),
        )


ALONE = Seat(rank=0, world_size=1, num_nodes=1, name="alone")
"""Outside of a job step."""
