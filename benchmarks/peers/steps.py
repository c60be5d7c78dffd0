"""What trains in benchmarks/preempt.py: a small network, a step every so often, and a line for each step that is made.

`train` is orchestrator's; benchmarks/peers/submitit_steps.py makes the same steps with the parts below.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

import orchestrator as orc

Batch = tuple[torch.Tensor, torch.Tensor]
STEPS_AN_EPOCH = 8
BATCH = 32


def data() -> Batch:
    """Samples, shape (n, 64), and labels, shape (n,): one epoch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS_AN_EPOCH * BATCH, 64, generator=generator)
    return x, x[:, :10].argmax(dim=1)


def network(width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Tanh(), torch.nn.Linear(width, 10))


def mark(folder: Path, trial: int, step: int) -> None:
    """Write down that a step was made: by whom, which, and when."""
    with (folder / str(trial)).open("a") as marks:
        marks.write(f"{os.getpid()} {step} {time.time()}\n")


def rest(began: float, period_s: float) -> None:
    """Wait until a step that began at `began` has taken `period_s`."""
    time.sleep(max(0.0, began + period_s - time.monotonic()))


def build(*, width: int) -> orc.State:
    net = network(width)
    return orc.State(net=net, opt=torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9))


def losses(net: torch.nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(net(x), y, reduction="none")


def train(trial: orc.Trial, *, number: int, epochs: int, period_s: float) -> None:
    samples, marks = data(), Path("marks")
    marks.mkdir(exist_ok=True)
    trial.build(build)
    for _ in trial.epochs(epochs):
        for batch in trial.batches(samples, BATCH):
            began = time.monotonic()
            trial.step(losses, batch)
            mark(marks, number, trial.num_steps)
            rest(began, period_s)
    trial.validate(losses, samples)
