"""submitit: an array job of blocks, its results collected; on this machine or on Slurm.

python benchmarks/peers/submitit_array.py --trials 200 --tasks 2 --folder FOLDER [--cluster slurm]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import submitit


def block(first: int, last: int) -> list[tuple[float, int]]:
    """What a job does; torch is imported here, where it is needed."""
    from digits_plain import train_block

    return train_block(first, last)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cluster", choices=["local", "slurm"], default="local")
    given = parser.parse_args()
    executor = submitit.AutoExecutor(given.folder, cluster=given.cluster)
    executor.update_parameters(timeout_min=60, cpus_per_task=1)
    if given.cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=2)
    bounds = [given.trials * k // given.tasks for k in range(given.tasks + 1)]
    jobs = executor.map_array(block, bounds[:-1], bounds[1:])
    results = [result for job in jobs for result in job.result()]
    assert len(results) == given.trials
    print("best", *min(results))


if __name__ == "__main__":
    main()
