"""Who a process is: its place in Slurm, its machine, its versions. Data for the first line of its record file."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.procfs import boot_id
from orchestrator.store import Json, JsonObject

__all__ = ["SlurmPlace", "describe"]

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
