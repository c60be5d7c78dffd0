"""Which of a machine's GPUs a rank works on, where trials run side by side."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.config.spec import Launch
from orchestrator.errors import OrcError

__all__ = ["devices", "devices_of_trial"]


def devices(
    launch: Launch, environment: Mapping[str, str], *, slot: int, local_rank: int, num_ranks: int
) -> str | None:
    """The GPUs of a rank, as CUDA_VISIBLE_DEVICES names them; None where the sweep leaves that to the job.

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
    found = names.split(",") if names is not None else [str(number) for number in range(first + launch.gpus)]
    found = [name for name in found if name]
    if len(found) < first + launch.gpus:
        raise OrcError(
            f"launch.gpus, ranks_per_node and trials_per_node ask for {launch.gpus_per_node} GPUs on each machine, and "
            f"this job has {len(found)} here (CUDA_VISIBLE_DEVICES={names}); did `slurm:` ask for fewer?"
        )
    return ",".join(found[first : first + launch.gpus])


def devices_of_trial(launch: Launch, environment: Mapping[str, str], *, slot: int, num_ranks: int) -> str | None:
    """All GPUs of a trial's `num_ranks` ranks here: a program chooses among them by LOCAL_RANK, as under torchrun.

    Raises:
        OrcError: the job has fewer.
    """
    if not launch.gpus:
        return None
    found = (devices(launch, environment, slot=slot, local_rank=rank, num_ranks=num_ranks) for rank in range(num_ranks))
    return ",".join(names for names in found if names is not None)
