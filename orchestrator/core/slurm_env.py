"""What Slurm's variables say of a process: its job, its place in a job step. And its machine and versions."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.atomic import Json, JsonObject
from orchestrator.core.procfs import boot_id

__all__ = ["ALONE", "LOOPBACK", "SlurmPlace", "StepTask", "describe"]

LOOPBACK = "127.0.0.1"
"""Where all processes are that meet on one machine."""
_LEVELS = (("avx512f", "AVX512"), ("avx2", "AVX2"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmPlace:
    """Where in Slurm a process runs.

    Args:
        job: how Slurm's commands name it: `<array job>_<task>` for an array element, since its bare job id can mean the
            whole
            array, else the job id.
        task: index in the array; None outside of one.
        restarts: how often Slurm has requeued this job.
    """

    job: str
    task: int | None
    restarts: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> SlurmPlace | None:
        """From Slurm's variables; None outside of a job."""
        if "SLURM_JOB_ID" not in environment:
            return None
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        in_array = array is not None and task is not None
        return cls(
            job=f"{array}_{task}" if in_array else environment["SLURM_JOB_ID"],
            task=int(task) if in_array and task else None,
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTask:
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
    def of(cls, environment: Mapping[str, str]) -> StepTask:
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


ALONE = StepTask(rank=0, world_size=1, num_nodes=1, name="alone")
"""Outside of a job step."""


def _cpu_level() -> str:
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        return os.uname().machine
    return next((name for flag, name in _LEVELS if flag in flags), "DEFAULT")


def _version(package: str) -> str | None:
    # Imported here, and socket below, since readers need this module for its words only.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(*, submission: str, slots: int, packages: tuple[str, ...]) -> JsonObject:
    """What the first line of a record file says of this process.

    Args:
        submission: token of the submission that started it.
        slots: how many trials it runs at the same time.
        packages: distributions whose versions decide results, such as torch.
    """
    import socket

    place = SlurmPlace.of(os.environ)
    versions: dict[str, Json] = {name: _version(name) for name in packages}
    versions["python"] = sys.version.split()[0]
    return {
        "submission": submission,
        "slots": slots,
        "job": place.job if place else None,
        "restarts": place.restarts if place else 0,
        "host": socket.gethostname(),
        "node": os.environ.get("SLURMD_NODENAME"),
        "pid": os.getpid(),
        "boot": boot_id(),
        "cpu": os.environ.get("ATEN_CPU_CAPABILITY") or _cpu_level(),
        "versions": versions,
    }
