"""submitit: jobs that take steps, with its own checkpointing or without, submitted to Slurm and left there.

python benchmarks/peers/submitit_steps.py --trials 8 --epochs 75 --period 0.1 --width 64 --folder FOLDER --partition low
    --node n0 [--plain]

A line for each job: its id, and the file in which its result will be.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import Checkpointable, DelayedSubmission


def make_steps(state: dict[str, Any], *, trial: int, epochs: int, period_s: float, width: int, folder: Path) -> float:
    """The steps that are left; returns the last loss. `state` is always that after a whole step."""
    import time

    import torch
    from steps import BATCH, STEPS_AN_EPOCH, data, losses, mark, network, rest

    torch.set_num_threads(1)
    torch.manual_seed(trial)
    net, (x, y) = network(width), data()
    opt = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    if state:
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
    loss = torch.zeros(1)
    for step in range(state.get("step", 0), epochs * STEPS_AN_EPOCH):
        began = time.monotonic()
        part = slice(step % STEPS_AN_EPOCH * BATCH, (step % STEPS_AN_EPOCH + 1) * BATCH)
        opt.zero_grad()
        loss = losses(net, (x[part], y[part])).mean()
        loss.backward()
        opt.step()
        state.update(step=step + 1, net=net.state_dict(), opt=opt.state_dict())
        mark(folder, trial, step + 1)
        rest(began, period_s)
    return float(loss)


class Training(Checkpointable):  # type: ignore[misc]  # submitit has no types
    """As submitit's documentation has it: the callable carries its state, and is pickled with it at the signal."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __call__(self, **given: Any) -> float:
        """Make the steps that are left."""
        return make_steps(self.state, **given)

    def checkpoint(self, **given: Any) -> DelayedSubmission:
        """What is to be called after the requeue."""
        return DelayedSubmission(self, **given)


def plain(**given: Any) -> float:
    """A callable without a `checkpoint` method."""
    return make_steps({}, **given)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--period", type=float, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--partition", required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    marks = given.folder / "marks"
    marks.mkdir(parents=True)
    executor = submitit.AutoExecutor(given.folder / "jobs", cluster="slurm")
    executor.update_parameters(timeout_min=60, cpus_per_task=1, slurm_partition=given.partition)
    executor.update_parameters(slurm_additional_parameters={"nodelist": given.node, "requeue": True})
    fixed = {"epochs": given.epochs, "period_s": given.period, "width": given.width, "folder": marks}
    with executor.batch():
        jobs = [executor.submit(plain if given.plain else Training(), trial=k, **fixed) for k in range(given.trials)]
    for job in jobs:
        print(job.job_id, job.paths.result_pickle)


if __name__ == "__main__":
    main()
