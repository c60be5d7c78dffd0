"""How a supervisor was started, and what follows from that for its workers: environment, logs, GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.plan import PlanFile
from orchestrator.config.spec import Launch
from orchestrator.core.messages import WorkerId
from orchestrator.core.paths import SweepPaths
from orchestrator.core.process_tree import MARK, mark
from orchestrator.core.slurm_env import ALONE, StepTask
from orchestrator.errors import OrcError
from orchestrator.supervisor.local_workers import LocalWorkers

__all__ = ["Options", "devices", "devices_of_trial", "new_local_workers", "num_ranks_here"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a supervisor runs.

    Args:
        paths: the sweep.
        submission: token of the submission that started it.
        worker: its number; it begins with the block of that number.
        slots: trials at the same time.
        seat: of this process in its job step; on every node of a job of several there is one.
    """

    paths: SweepPaths
    submission: str
    worker: int = 0
    slots: int = 1
    seat: StepTask = ALONE

    @property
    def folder(self) -> Path:
        """Where processes on several nodes meet."""
        return self.paths.rendezvous(f"{self.submission[:8]}-{self.worker}-{self.seat.name}")


def num_ranks_here(options: Options, plan: PlanFile) -> int:
    """Return the number of a trial's ranks on each machine."""
    launch = plan.spec.launch
    return launch.num_ranks if options.seat.num_nodes == 1 else launch.ranks_per_node


def new_local_workers(options: Options, plan: PlanFile) -> LocalWorkers:
    """Return the workers of this machine; none is started yet."""
    return LocalWorkers(
        options.paths,
        _environment(plan, options.submission),
        lambda worker: _log_of(options, worker),
        has_ranks=plan.spec.launch.num_ranks > 1,
        folder=options.folder if options.seat.num_nodes > 1 else None,
        devices_of=lambda worker: _devices_of(plan, worker, num_ranks_here(options, plan)),
    )


def _devices_of(plan: PlanFile, worker: WorkerId, num_here: int) -> str | None:
    launch = plan.spec.launch
    if plan.spec.command is not None:
        return devices_of_trial(launch, os.environ, slot=worker.slot, num_ranks=num_here)
    return devices(launch, os.environ, slot=worker.slot, local_rank=worker.rank % num_here, num_ranks=num_here)


def _log_of(options: Options, worker: WorkerId) -> Path | None:
    """Return a log of its own for each trial that runs side by side with others, and for each rank but the first."""
    if worker.rank:
        return options.paths.rank_log(options.submission, options.worker, *worker)
    return options.paths.slot_log(options.submission, options.worker, worker.slot) if options.slots > 1 else None


def _environment(plan: PlanFile, submission: str) -> dict[str, str]:
    threads = str(plan.spec.launch.cpus)
    fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    # The order in which a set of strings is looped over depends on this; what a trial comes to must not.
    hashing = {"PYTHONHASHSEED": "0"}
    return {
        **os.environ,
        **hashing,
        **plan.spec.env,
        **fixed,
        "PYTHONUNBUFFERED": "1",
        MARK: mark(submission, os.environ),
    }


def devices(
    launch: Launch, environment: Mapping[str, str], *, slot: int, local_rank: int, num_ranks: int
) -> str | None:
    """Return the GPUs of a rank, as CUDA_VISIBLE_DEVICES names them; None where the sweep leaves that to the job.

    Slots that share GPUs are neighbours; each rank of a trial has `launch.gpus` of its own among those of its slot.

    Args:
        launch: of the sweep.
        environment: in whose CUDA_VISIBLE_DEVICES Slurm has named the job's GPUs; without it they count from 0.
        slot: which of the trials side by side.
        local_rank: the rank's number on this machine.
        num_ranks: of its trial on this machine.

    Raises:
        OrcError: the job has fewer.
    """
    if not launch.gpus:
        return None
    first = (slot // launch.trials_per_gpu * num_ranks + local_rank) * launch.gpus
    names = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = names.split(",") if names is not None else [str(number) for number in range(first + launch.gpus)]
    gpus = [name for name in gpus if name]
    if len(gpus) < first + launch.gpus:
        raise OrcError(
            f"launch.gpus, ranks_per_node and trials_per_node ask for {launch.gpus_per_node} GPUs on each machine, and "
            f"this job has {len(gpus)} here (CUDA_VISIBLE_DEVICES={names}); did `slurm:` ask for fewer?"
        )
    return ",".join(gpus[first : first + launch.gpus])


def devices_of_trial(launch: Launch, environment: Mapping[str, str], *, slot: int, num_ranks: int) -> str | None:
    """Return the GPUs of all `num_ranks` ranks here: a program chooses among them by LOCAL_RANK, as under torchrun.

    Raises:
        OrcError: the job has fewer.
    """
    if not launch.gpus:
        return None
    of_ranks = (
        devices(launch, environment, slot=slot, local_rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)
    )
    return ",".join(names for names in of_ranks if names is not None)
